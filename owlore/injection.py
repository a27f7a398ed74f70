"""Putting a PEFT adapter into a model, and saving it.

PEFT replaces the target layers inside the given model, so that the model object computes with the adapter; the wrapper
that PEFT returns is only needed to save and to merge. So the engine trains the same model object with and without an
adapter.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from htsr.console import quiet_libraries
from htsr.errors import UsageError
from owlore.kernels.seeds import seed_for

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class InjectedAdapter:
    """An adapter inside a model.

    Attributes:
        wrapper: PEFT's model around it.
        trained: Names of the adapter's parameters in the model.
        notes: What a resumed run needs to build the same adapter, as JSON.
        initial: The adapter's first tensors by PEFT's names, if the initialisation subtracted their product from the
            base weights, which a saved adapter has to account for; else None.
        saves_bytes: Bytes that quantising the base would save, if only shapes are known so that it was not quantised.
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
        """Write an adapter directory for `PeftModel.from_pretrained` with `base` as the name of the base model."""
        self.config.base_model_name_or_path = base
        with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
            converting = {}
            if self.initial is not None:  # PEFT saves the adapter's difference to its first tensors
                save_file(self.initial, Path(folder) / "adapter_model.safetensors")
                converting = {"path_initial_model_for_weight_conversion": folder}
            self.wrapper.save_pretrained(str(directory), save_embedding_layers=False, **converting)


def inject_adapter(model: nn.Module, config: Any, *, seed: int, takes_from_base: bool = False) -> InjectedAdapter:
    """Put the adapter of a PEFT configuration into a model.

    Args:
        model: The model, which is changed.
        config: The PEFT configuration.
        seed: Seed of the adapter's random numbers, which do not depend on the global generator.
        takes_from_base: Whether the initialisation subtracts its product from the base weights (PiSSA).

    Raises:
        UsageError: The configuration does not fit the model.
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
    initial: dict[str, Tensor] | None = None
    if takes_from_base and device.type != "meta":
        initial = {n: t.detach().cpu().clone() for n, t in get_peft_model_state_dict(wrapper).items()}
    return InjectedAdapter(wrapper=wrapper, trained=trained, initial=initial)


def holds_adapter(model: nn.Module) -> bool:
    """Whether a model has layers of a PEFT adapter."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # if PEFT was not imported, there are none
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory has a PEFT adapter."""
    return (Path(directory) / CONFIG_FILE).is_file()


def smallest_side(model: nn.Module, targets: str | list[str]) -> int:
    """The smallest number of inputs or outputs of the target layers of an adapter, which is a bound of its rank.

    Args:
        model: The model.
        targets: "all-linear" (all but the head), or names, which are compared with the end of a module's name as PEFT
            does.
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
