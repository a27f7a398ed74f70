"""A linear layer with trained matrix product operators (MPOs) beside its weight.

The layer's effective weight is W = base + a sum of terms, each a signed MPO; it is rebuilt in every forward and
backward and is not kept. An active adapter adds MPO(c) - MPO(c0), where c0 is a frozen copy of its first cores; that
is exactly zero at the start. If the base is an adapter's explicit residual W0 - MPO(c0), then MPO(c0) is added first,
so that MPO(c) of that adapter remains while it is active.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from owlore.adapters.base import AdaptedLinear
from owlore.adapters.dota_config import DotaConfig
from owlore.adapters.nf4_linear import Nf4Linear
from owlore.adapters.targets import dense_weight, device_and_dtype, is_plain, matrix_of
from owlore.kernels.mpo import MpoShape, Term, add_terms, decompose, make_shape, mpo_linear, random_cores, rebuild
from owlore.kernels.nf4 import dequantise, quantise
from owlore.kernels.seeds import generator_for


class MpoCores(nn.Module):
    """The MPO of one adapter in one matrix: trained cores `core_k` and their frozen first values `start_k`.

    Args:
        shape: Shape of the MPO.
        cores: First values of the cores; they are converted to fp32, or fp64 for a base in fp64.
        base: The layer that is adapted, for device and dtype.
    """

    def __init__(self, shape: MpoShape, cores: list[Tensor], base: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        for k, core in enumerate(cores):
            first = core.to(*device_and_dtype(base)).contiguous()
            self.register_parameter(f"core_{k}", nn.Parameter(first))
            self.register_buffer(f"start_{k}", first.clone())

    @property
    def cores(self) -> list[Tensor]:
        """The trained cores c."""
        return [getattr(self, f"core_{k}") for k in range(len(self.shape.out))]

    @property
    def start(self) -> list[Tensor]:
        """The first cores c0."""
        return [getattr(self, f"start_{k}") for k in range(len(self.shape.out))]


class DotaLayer(AdaptedLinear):
    """A linear layer with the MPOs of one or several adapters.

    Args:
        base_layer: The layer (nn.Linear, Conv1D or quantised), or another adapter's layer around it.
        name: Name of the layer in the model; random cores depend on it.
    """

    adapter_layer_names = ("dota_mpo",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.name = name
        self.dota_mpo = nn.ModuleDict()
        self.explicit: str | None = None  # the adapter whose residual the base is
        self._pending: Callable[[], None] | None = None  # changes the base once the cores of a file are loaded
        self._unmerged: Tensor | None = None  # the base weight before a merge
        self.register_load_state_dict_post_hook(_apply_base_change)

    def update_layer(self, adapter_name: str, config: DotaConfig) -> None:
        """Add an adapter: decompose the weight, or make cores of the right shapes to be loaded, and change the base.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.

        Raises:
            ValueError: The base has to change and is already quantised or a residual.
        """
        base = self.get_base_layer()
        changes = config.residual == "explicit" or config.quantise is not None
        if changes and not is_plain(base):
            raise ValueError(
                f"{self.name} has a {type(base).__name__} (quantised, or another adapter's residual): "
                'expected plain float weights for residual="explicit" or quantise'
            )
        shape = make_shape(self.out_features, self.in_features, config.num_cores, config.bond, config.cuts)
        if config.fresh:
            cores = first_cores(dense_weight(base), shape, config, self.name)
        else:
            cores = [torch.zeros(core) for core in shape.cores]
        self.dota_mpo[adapter_name] = MpoCores(shape, cores, base)
        if changes:
            self._pending = lambda: self._change_base(adapter_name, config)
        if config.fresh:
            _apply_base_change(self)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _change_base(self, adapter_name: str, config: DotaConfig) -> None:
        """Make the base W0 - MPO(c0), or keep W0, and quantise it if `config.quantise` is set."""
        base = self.get_base_layer()
        weight = dense_weight(base)
        if config.residual == "explicit":
            start = self._mpo(adapter_name)
            product = rebuild([core.double() for core in start.start], start.shape)
            weight = (weight.double() - product).to(weight.dtype)
            self.explicit = adapter_name
        if config.quantise is None:
            matrix_of(base).copy_(weight)
            return
        self.base_layer = Nf4Linear(weight, base)
        # PEFT refers to the old module until every target is replaced; its weight is freed now.
        base.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)

    def _mpo(self, name: str) -> MpoCores:
        found = self.dota_mpo[name]
        assert isinstance(found, MpoCores)
        return found

    # -- the effective weight ----------------------------------------------------------------------------------------

    def _terms(self, names: list[str]) -> tuple[list[Term], list[Tensor]]:
        """The MPOs that these adapters add to the base, and the cores of all of them in order."""
        signed: list[tuple[int, MpoShape, list[Tensor]]] = []
        if self.explicit is not None and self.explicit not in names:
            anchor = self._mpo(self.explicit)
            signed.append((1, anchor.shape, anchor.start))
        for name in names:
            mpo = self._mpo(name)
            signed.append((1, mpo.shape, mpo.cores))
            if name != self.explicit:
                signed.append((-1, mpo.shape, mpo.start))
        terms = [Term(shape=shape, sign=sign) for sign, shape, _ in signed]
        return terms, [core for _, _, cores in signed for core in cores]

    @torch.no_grad()
    def effective(self, names: list[str]) -> Tensor:
        """The effective weight when these adapters are active, (outputs x inputs) in the base's dtype."""
        terms, cores = self._terms(self._present(names))
        base = dense_weight(self.get_base_layer())
        return add_terms(base, terms, cores) if terms else base.clone()

    # -- mpo_linear's DenseLayer -------------------------------------------------------------------------------------

    def kept_weight(self) -> Tensor | None:
        """The base weight if it is plain, for autograd to save."""
        base = self.get_base_layer()
        return matrix_of(base) if is_plain(base) else None

    def base_weight(self, kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The saved base weight, or the dequantised one; None for a base that another library quantised."""
        base = self.get_base_layer()
        return base.dense(dtype) if isinstance(base, Nf4Linear) else kept

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output with this weight, and with the base's bias unless another library quantised the base."""
        base = self.get_base_layer()
        if not is_plain(base) and not isinstance(base, Nf4Linear):
            return nn.functional.linear(x, weight.to(x.dtype))
        if isinstance(base, Conv1D):  # the same call with the same memory layout gives the same bits
            flat = torch.addmm(base.bias, x.reshape(-1, x.shape[-1]), weight.T.contiguous())
            return flat.view(*x.shape[:-1], base.nf)
        return nn.functional.linear(x, weight, base.bias)  # type: ignore[arg-type]

    # -- PEFT's interface --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        terms, cores = ([], []) if self.merged else self._terms(names)
        if not terms:
            return self.base_layer(x, *args, **kwargs)
        base = self.get_base_layer()
        if is_plain(base) or isinstance(base, Nf4Linear):
            return mpo_linear(x, self, terms, cores, getattr(base, "bias", None))
        y = self.base_layer(x, *args, **kwargs)
        return y + mpo_linear(x, self, terms, cores).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight into the base until `unmerge`.

        Args:
            safe_merge: Whether to refuse a result that is not finite.
            adapter_names: The adapters to merge; None takes the active ones.

        Raises:
            ValueError: The base is quantised, or the result is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base = self.get_base_layer()
        if not is_plain(base):
            raise ValueError(
                "got a quantised base, expected float weights: merge_and_unload makes it dense, or load the adapter "
                "with quantise=None on the unquantised model"
            )
        wanted = [*self.merged_adapters, *names]
        self.unmerge()
        merged = self.effective(wanted)
        self._check(merged, safe_merge)
        self._unmerged = matrix_of(base).clone()
        matrix_of(base).copy_(merged)
        self.merged_adapters.extend(wanted)

    def _check(self, weight: Tensor, safe: bool) -> None:
        if safe and not torch.isfinite(weight).all():
            raise ValueError(f"NaN or infinity in the merged weight of {self.name}")

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        if self._unmerged is not None:
            matrix_of(self.get_base_layer()).copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """MPO(c) - MPO(c0), (outputs x inputs) in the cores' dtype."""
        mpo = self._mpo(adapter)
        return (rebuild(mpo.cores, mpo.shape) - rebuild(mpo.start, mpo.shape)).detach()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: The base is the residual of this adapter, so that its first cores are needed.
        """
        if adapter_name == self.explicit:
            raise ValueError(
                f"the base of {self.name} is the residual of adapter {adapter_name}: unload the model instead"
            )
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """A plain layer with the effective weight of the adapters if `merge`, else that of no adapter."""
        base = self.get_base_layer()
        names = [] if not merge else self.active_adapters if adapter_names is None else adapter_names
        if not is_plain(base) and not isinstance(base, Nf4Linear):
            if merge:
                self.merge(safe_merge, adapter_names)  # raises an error that says why not
            return base
        self.unmerge()
        merged = self.effective(names)
        self._check(merged, safe_merge)
        if isinstance(base, Nf4Linear):
            self.base_layer = base.as_plain(merged)  # PEFT copies weight and bias from here
            return self.base_layer
        matrix_of(base).copy_(merged)
        return base

    def __repr__(self) -> str:
        return "dota." + super().__repr__()


def _apply_base_change(layer: nn.Module, *unused: Any) -> None:
    """Change the base once the first cores are there; also called after a state dict was loaded."""
    assert isinstance(layer, DotaLayer)
    if layer._pending is None or any(core.is_meta for mpo in layer.dota_mpo.values() for core in mpo.buffers()):
        return
    pending, layer._pending = layer._pending, None
    with torch.no_grad():
        pending()


@torch.no_grad()
def first_cores(weight: Tensor, shape: MpoShape, config: DotaConfig, name: str) -> list[Tensor]:
    """The cores that an adapter starts from.

    Alternations (LoftQ, arXiv 2310.08659, algorithm 1) quantise W0 - MPO(c) and refit the cores to W0 minus the
    quantised residual. The best round is kept, so that the error never grows.

    Args:
        weight: W0 (outputs x inputs), of any float dtype.
        shape: Shape of the MPO.
        config: The configuration: init, gauge, seed and alternations are read.
        name: Name of the layer, on which random cores depend.

    Returns:
        The cores, fp64.
    """
    cores = decompose(weight, shape, config.gauge)
    if config.init == "random":  # of the operator's own norm, so that only its directions differ
        norm = float(torch.linalg.vector_norm(rebuild(cores, shape)))
        return random_cores(shape, norm, generator_for(config.seed, "dota-random", name))
    if not config.alternations:
        return cores
    wide = weight.double()
    best, least = cores, math.inf
    for alternation in range(config.alternations + 1):
        product = rebuild([core.float().double() for core in cores], shape)
        residual = dequantise(quantise((wide - product).to(weight.dtype)), torch.float64)
        error = float(torch.linalg.vector_norm(wide - product - residual))
        best, least = (cores, error) if error < least else (best, least)
        if alternation < config.alternations:
            cores = decompose(wide - residual, shape, config.gauge)
    return best
