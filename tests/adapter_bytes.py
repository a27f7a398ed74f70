"""What an adapter holds, by formula, from shapes alone: an oracle for the counts of the adapters' tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from owlore.adapters.dota_config import DotaConfig
from owlore.adapters.dota_model import bond_of
from owlore.adapters.selection import budget, make_map
from owlore.adapters.smt_config import SmtConfig
from owlore.adapters.targets import find_targets, is_plain, is_shared
from owlore.kernels import nf4
from owlore.kernels.block_sparse import make_layout
from owlore.kernels.mpo import make_shape


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Counts and bytes of one adapter.

    Attributes:
        trainable: Number of trained parameters, fp32.
        frozen_bytes: What the adapter keeps beside them (W0's blocks, first cores).
        file_bytes: Tensors of a saved adapter.
        base_bytes: Weights of the target matrices as they are stored.
    """

    trainable: int
    frozen_bytes: int
    file_bytes: int
    base_bytes: int


def planned(model: nn.Module, config: SmtConfig | DotaConfig) -> Planned:
    """What `get_peft_model(model, config)` will hold; the model may be on the meta device.

    For SMT with a selection that needs data or weights it is an upper bound, as if every chosen block had full size.
    """
    return _smt(model, config) if isinstance(config, SmtConfig) else _dota(model, config)


def _smt(model: nn.Module, config: SmtConfig) -> Planned:
    targets = {target.name: target for target in find_targets(model, config)}
    block_map = config.block_map
    if block_map is None and config.selection in ("diagonal", "random"):
        block_map = make_map(model, config)
    if block_map is None:
        chosen = budget(model, config)
        entries, cells = chosen.blocks * chosen.block_size**2, chosen.blocks
        frozen = entries * max(_item_bytes(target.module) for target in targets.values())
    else:
        sizes = {
            name: make_layout(targets[name].shape, block_map["block_size"], members).size
            for name, members in block_map["blocks"].items()
        }
        entries, cells = sum(sizes.values()), sum(len(members) for members in block_map["blocks"].values())
        written = {n: t.module for n, t in targets.items() if n in sizes and _written(model, t.module, config)}
        frozen = sum(sizes[name] * _item_bytes(module) for name, module in written.items())
    base = sum(_weight_bytes(target.module) for target in targets.values())
    return Planned(trainable=entries, frozen_bytes=frozen, file_bytes=4 * entries + 8 * cells, base_bytes=base)


def _written(model: nn.Module, module: nn.Module, config: SmtConfig) -> bool:
    return config.mode == "inplace" or (config.mode == "auto" and is_plain(module) and not is_shared(model, module))


def _dota(model: nn.Module, config: DotaConfig) -> Planned:
    targets = find_targets(model, config)
    bond = bond_of(model, config)
    count = sum(make_shape(*t.shape, config.num_cores, bond, config.cuts).parameters for t in targets)
    if config.quantise is None:
        base = sum(_weight_bytes(target.module) for target in targets)
    else:
        base = sum(nf4.planned_bytes(target.shape[0] * target.shape[1]) for target in targets)
    return Planned(trainable=count, frozen_bytes=4 * count, file_bytes=8 * count, base_bytes=base)


def _item_bytes(module: nn.Module) -> int:
    return module.weight.element_size() if is_plain(module) else 0  # type: ignore[operator]


def _weight_bytes(module: nn.Module) -> int:
    """Bytes of the weight as it is stored: parameters and buffers but the bias."""
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return sum(tensor.numel() * tensor.element_size() for name, tensor in held if name != "bias")
