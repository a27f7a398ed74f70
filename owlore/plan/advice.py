"""What other settings would save, each planned and not guessed: ranked advice for `owlore plan` and for exit 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from htsr.errors import HtsrError
from owlore.config import SETTINGS, TrainConfig, as_typed
from owlore.strategies import STRATEGIES

if TYPE_CHECKING:
    from owlore.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change of settings that lowers the planned peak.

    Attributes:
        change: the changed settings as they are typed on the command line.
        saves: bytes of the planned peak, above 0.
        price: what it costs in return.
    """

    change: str
    saves: int
    price: str


def advise(config: TrainConfig, now: Plan, plan: Callable[[TrainConfig], Plan]) -> tuple[Advice, ...]:
    """Plan single changes of settings and rank those that lower the peak.

    Args:
        config: the settings, resolved.
        now: their plan.
        plan: plans other settings.

    Returns:
        The changes, the largest saving first; each is planned alone, the others as they are.
    """
    found = []
    for change, price in _changes(config):
        try:
            saves = now.bytes["total"] - plan(replace(config, **change)).bytes["total"]
        except HtsrError:  # settings that do not go together are no advice
            continue
        if saves > 0:
            found.append(Advice(change=as_typed(change), saves=saves, price=price))
    return tuple(sorted(found, key=lambda advice: -advice.saves))


def _changes(config: TrainConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of settings that the method accepts and that are not made yet, each with its price."""
    accepted = STRATEGIES[config.method].accepted_options
    for change, price in _every_change(config):
        refused = {name for name in change if SETTINGS[name].metadata.get("method") and name not in accepted}
        if not refused and any(getattr(config, name) != value for name, value in change.items()):
            yield change, price


def _every_change(config: TrainConfig) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"checkpointing": "on"}, "blocks that backward reaches are computed twice"
    if config.batch > 1:
        half = config.batch // 2
        yield {"batch": half, "accum": config.accum * -(-config.batch // half)}, "the same step in smaller parts"
    if config.seq_len > 64:
        yield {"seq_len": config.seq_len // 2}, "longer rows are cut"
    if config.active is None or config.active > 1:
        yield {"active": 1}, "one block learns at a time"
    if config.rank == "full" or int(config.rank) > 8:
        yield {"rank": 128 if config.rank == "full" else int(config.rank) // 2}, "updates of lower rank"
    yield {"state_bits": 8}, "moments are rounded"
    yield {"weights": "bf16-sr"}, "no fp32 masters, updates are rounded stochastically"
    yield {"always_on": ()}, "embeddings, final norm and head stay as they are"
    yield {"on_switch": "drop"}, "moments begin anew at each activation"
    yield {"residency": "host"}, "frozen blocks are copied to the device as they are needed"
    yield {"frozen": "nf4"}, "frozen blocks are read in 4 bits"
    yield {"offload_activations": True}, "activations wait in host memory"
    if config.dtype in ("auto", "float32") and config.weights != "fp32":
        yield {"dtype": "bfloat16"}, "16-bit forward and backward; fp32 masters for what is trained"
