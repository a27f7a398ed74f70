"""`owlore merge`: merging an adapter into its base model, in fp32 and from the unquantised weights."""

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
    """The result of a merge. Its logits are compared with those of the adapter on its base as it was trained.

    Attributes:
        directory: Directory of the merged model.
        base: The base model.
        matrices: Number of matrices that the adapter changes.
        max_difference: Largest difference of two logits.
        max_logit: Largest magnitude of a logit.
        same_best: Share of tokens with the same most probable next token.
    """

    directory: str
    base: str
    matrices: int
    max_difference: float
    max_logit: float
    same_best: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def merge(ref: str | Path, out: str | Path, *, device: torch.device) -> Merged:
    """Merge an adapter into the base model that it names.

    The sums are computed in fp32 from the weights of the base's checkpoint, also if the adapter was trained on a
    quantised base, and are rounded to the checkpoint's dtype once. Tensors without an adapter keep their bits.

    Args:
        ref: A run directory or an adapter directory.
        out: Directory of the merged model; it must be empty or not exist.
        device: Where the merge is computed.

    Raises:
        NotFound: `ref` or the base does not exist.
        BadInput: There is no adapter, or it does not fit its base.
        UsageError: `out` is not empty.
    """
    directory, out = adapter_of(ref), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"-o {out}: exists and is not empty; name another directory")
    before = probe_logits(load_trained(directory, device=device).model)
    loaded, wrapper = adapter_on_base(directory, device=device, dtype="float32", quantised=False)
    names = {f"{name}.weight" for name in wrapper.targeted_module_names}
    with quiet_libraries():
        plain = wrapper.merge_and_unload(safe_merge=True)
    export(replace(loaded, model=plain), out, trained=names, seed=None)
    del wrapper, plain, loaded
    after = probe_logits(load_trained(out, device=device).model)
    return Merged(
        directory=str(out),
        base=base_of(directory),
        matrices=len(names),
        max_difference=float((before - after).abs().max()),
        max_logit=float(before.abs().max()),
        same_best=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )


def adapter_of(ref: str | Path) -> Path:
    """The adapter directory that `ref` is, or the one in `model/` of the run directory `ref`.

    Raises:
        NotFound: There is no such directory.
        BadInput: It has no adapter.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        raise NotFound(f"{ref}: no such directory; give a run directory or an adapter directory")
    for directory in (path, path / "model"):
        if is_adapter(directory):
            return directory
    raise BadInput(f"{ref} holds no adapter (no {CONFIG_FILE}): there is nothing to merge")


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """Logits (tokens x vocabulary, fp32, CPU) of a fixed row of tokens."""
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.arange(PROBE_TOKENS).mul_(7919).remainder_(vocabulary)[None].to(next(model.parameters()).device)
    return model(input_ids=row, use_cache=False).logits[0].float().cpu()
