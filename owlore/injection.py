"""Put a PEFT adapter into a model, and write it down again.

PEFT replaces the targeted linear maps inside the model it is given, so that the model object itself computes with the
adapter from then on; what it returns around it is only needed to save and to merge. The engine therefore trains the
model it already has, and no shortcut of its (chunked loss, checkpointed blocks) has to know of adapters.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htsr.console import quiet_libraries
from htsr.errors import UsageError
from owlore.kernels.seeds import seed_for

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class InjectedAdapter:
    """An adapter inside a model.

    wrapper: PEFT's model around it. trained: names of the adapter's parameters in the model. notes: what a continued
    run has to be told to build the same adapter, as JSON. initial: the adapter's first tensors by PEFT's names, kept
    only where the initialisation took something out of the base, which a saved adapter then has to give back.
    saves_bytes: what quantising the base would save, where only shapes are known and it was not done.
    """

    wrapper: Any
    trained: frozenset[str]
    notes: dict[str, Any] = field(default_factory=dict)
    initial: dict[str, Tensor] | None = None
    saves_bytes: int = 0

    @property
    def config(self) -> Any:
        """The adapter's PEFT configuration."""
        return self.wrapper.peft_config[self.wrapper.active_adapter]

    def save(self, directory: Path, *, base: str) -> None:
        """Write an adapter directory for `PeftModel.from_pretrained` on the model that `base` names."""
        self.config.base_model_name_or_path = base
        with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
            converting = {} if self.initial is None else {"path_initial_model_for_weight_conversion": folder}
            if self.initial is not None:
                self._save_initial(Path(folder))
            self.wrapper.save_pretrained(str(directory), save_embedding_layers=False, **converting)

    def _save_initial(self, directory: Path) -> None:
        """The adapter as it began, beside which PEFT computes what training changed."""
        from safetensors.torch import save_file

        assert self.initial is not None
        save_file(self.initial, directory / "adapter_model.safetensors")


def inject_adapter(model: nn.Module, config: Any, *, seed: int, takes_from_base: bool = False) -> InjectedAdapter:
    """Inject the adapter that a PEFT configuration describes; its random numbers come from `seed` alone.

    takes_from_base: the initialisation subtracts its product from the base weights (PiSSA).

    Raises: UsageError when the configuration does not fit the model.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    device = next(model.parameters()).device
    with quiet_libraries(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            wrapper = get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"the adapter does not fit this model: {' '.join(str(error).split())}") from error
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    initial: Mapping[str, Tensor] | None = None
    if takes_from_base and device.type != "meta":
        initial = {n: t.detach().cpu().clone() for n, t in get_peft_model_state_dict(wrapper).items()}
    return InjectedAdapter(wrapper=wrapper, trained=trained, initial=None if initial is None else dict(initial))


def holds_adapter(model: nn.Module) -> bool:
    """Whether PEFT's layers lie in it."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # who has not imported it has none of its layers
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())


def is_adapter(directory: str | Path) -> bool:
    """Whether a PEFT adapter lies there."""
    return (Path(directory) / CONFIG_FILE).is_file()


def smallest_side(model: nn.Module, targets: str | list[str]) -> int:
    """The smallest number of inputs or outputs among the linear maps that an adapter is meant for; bounds a rank.

    targets: `all-linear` (all but the head) or names, matched at the end of a module's name as PEFT does.
    """
    access = getattr(model, "get_output_embeddings", None)
    head = None if access is None else access()
    sides = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or hasattr(module, "num_embeddings") or module is head:
            continue
        if isinstance(targets, str) or any(name == t or name.endswith(f".{t}") for t in targets):
            sides.append(min(weight.shape))
    return min(sides, default=1)
