"""`owlore merge`: an adapter and its base made into one plain model, in fp32 and from the unquantised weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htsr.console import quiet_libraries
from htsr.errors import BadInput, NotFound, UsageError
from owlore.injection import CONFIG_FILE, is_adapter
from owlore.io.export import export
from owlore.models.trained import adapter_on_base, base_of, load_trained

PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did: the written directory, the base, and how far the logits of what was written lie from those of
    the adapter on its base as it was trained (largest difference, largest logit, share of tokens with the same best).
    """

    directory: str
    base: str
    matrices: int
    max_difference: float
    max_logit: float
    same_best: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(ref: str | Path, out: str | Path, *, device: torch.device) -> Merged:
    """Merge the adapter that `ref` (a run directory or an adapter directory) holds into the base that it names.

    The sums are made in fp32 on the base as its checkpoint has it, also where the adapter was trained on a quantised
    one; they are rounded to the checkpoint's dtype once. Tensors without an adapter keep their bits.

    Raises: NotFound, BadInput (no adapter, or one that does not fit its base), UsageError when `out` is taken.
    """
    place, out = adapter_of(ref), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"-o {out}: exists and is not empty; name another directory")
    before = probe_logits(load_trained(place, device=device).model)
    loaded, wrapper = adapter_on_base(place, device=device, dtype="float32", quantised=False)
    names = {f"{name}.weight" for name in wrapper.targeted_module_names}
    with quiet_libraries():
        plain = wrapper.merge_and_unload(safe_merge=True)
    export(replace(loaded, model=plain), out, trained=names, seed=None)
    del wrapper, plain, loaded
    after = probe_logits(load_trained(out, device=device).model)
    return Merged(
        directory=str(out),
        base=base_of(place),
        matrices=len(names),
        max_difference=float((before - after).abs().max()),
        max_logit=float(before.abs().max()),
        same_best=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )


def adapter_of(ref: str | Path) -> Path:
    """The adapter directory that `ref` is, or that the run `ref` left in `model/`.

    Raises: NotFound, BadInput when there is no adapter.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        raise NotFound(f"{ref}: no such directory; give a run directory or an adapter directory")
    for place in (path, path / "model"):
        if is_adapter(place):
            return place
    raise BadInput(f"{ref} holds no adapter (no {CONFIG_FILE}): there is nothing to merge")


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """Logits (tokens x vocabulary, fp32, CPU) of a fixed row of tokens."""
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.arange(PROBE_TOKENS).mul_(7919).remainder_(vocabulary)[None].to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=row, use_cache=False).logits
    return logits[0].float().cpu()
