"""An optimizer whose state is a function of the active set.

Every parameter that may ever be trained is known from the start; `switch` makes some of them active. A parameter that
joins gets a state (master, moments, basis) and a gradient hook, one that leaves loses both, and what is held between
switches depends on the active set alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from owlore.choices import ON_SWITCH
from owlore.optim.parameter_state import ParameterState, new_state
from owlore.optim.projected_linear import linear_maps, tap
from owlore.optim.update_spec import HeldBytes, MasterPolicy, UpdateSpec
from owlore.patches import PatchStack, Undo


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What a switch of the active set did.

    Attributes:
        joined: names of the parameters that became active.
        stayed: names of those that were active and still are.
        left: names of those that are active no more.
        lost_norm: norm of what was lost when the masters of `left` were rounded into 16-bit parameters.
    """

    joined: tuple[str, ...]
    stayed: tuple[str, ...]
    left: tuple[str, ...]
    lost_norm: float


@dataclass(frozen=True)
class Parked:
    """State of a frozen parameter that waits for its next activation (`on_switch` of `host` and `keep`).

    Attributes:
        tensors: what `ParameterState.tensors` returned.
        counters: what `ParameterState.counters` returned.
    """

    tensors: dict[str, Tensor]
    counters: dict[str, int | None]


class RotatingOptimizer:
    """AdamW, projected where a spec says so, over a changing set of parameters.

    Args:
        parameters: every parameter that may become active, by name.
        seed: seed of the run.
        policy: how a 16-bit parameter takes updates.
        on_switch: what happens to the moments of a parameter that leaves: `drop` frees them, `host` moves them to host
            memory, `keep` leaves them on the device.
        grad_scale: factor that the loss was multiplied with (fp16), divided out of each gradient.
        add_up: replaces each tensor of a list by its sum over the processes that train together; None for one process.
        layers: modules whose linear maps give their matrix's gradient already projected (`projected_linear`); must not
            contain what a compiler traces.
        patches: the run's stack, on which hooks and forwards are registered; a new one by default.

    Raises:
        ValueError: `on_switch` is unknown.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        seed: int,
        policy: MasterPolicy = MasterPolicy.MASTER,
        on_switch: str = "drop",
        grad_scale: float = 1.0,
        add_up: Callable[[Sequence[Tensor]], None] | None = None,
        layers: Iterable[nn.Module] = (),
        patches: PatchStack | None = None,
    ) -> None:
        if on_switch not in ON_SWITCH:
            raise ValueError(f"on_switch must be one of {', '.join(ON_SWITCH)}, got {on_switch!r}")
        self.parameters = dict(parameters)
        self.seed, self.policy, self.on_switch, self.grad_scale = seed, policy, on_switch, grad_scale
        self.add_up = add_up
        self.states: dict[str, ParameterState] = {}
        self.parked: dict[str, Parked] = {}
        self._linear_maps = linear_maps(layers)
        self._patches = PatchStack() if patches is None else patches
        self._listeners: dict[str, list[Undo]] = {}  # by active parameter: what removes its hook and forward
        self._last_micro_batch = True
        self._step = 0
        self._squares: Tensor | None = None  # of this step, by state: squared norm of what was accumulated
        self._seen: Tensor | None = None  # the same summed over the updates since the last `take_norms`
        self._updates_seen = 0

    # -- the active set ----------------------------------------------------------------------------------------------

    def switch(self, wanted: Mapping[str, UpdateSpec], step: int, between: Callable[[], None] = lambda: None) -> Switch:
        """Make exactly these parameters active; those that stay get a new basis and keep their moments.

        Args:
            wanted: how each active parameter is updated, by name.
            step: global step, from 0, from which on they are active.
            between: called when the parameters that leave are written back and none has joined yet.

        Raises:
            KeyError: the optimizer was not built with one of the names.
        """
        unknown = [name for name in wanted if name not in self.parameters]
        if unknown:
            raise KeyError(f"not a parameter of this optimizer: {unknown[0]}")
        self._squares, self._seen, self._updates_seen = None, None, 0  # one number a state, and the states change
        left = tuple(name for name in self.states if name not in wanted)
        lost = sum(self._leave(name, step) ** 2 for name in left) ** 0.5
        between()
        stayed = tuple(name for name in wanted if name in self.states)
        for name in stayed:
            self.states[name].reset_basis()
        joined = tuple(name for name in wanted if name not in self.states)
        for name in joined:
            self._join(name, wanted[name])
        return Switch(joined=joined, stayed=stayed, left=left, lost_norm=lost)

    def _join(self, name: str, spec: UpdateSpec) -> None:
        parameter = self.parameters[name]
        state = new_state(name, parameter, spec, policy=self.policy, seed=self.seed, grad_scale=self.grad_scale)
        parked = self.parked.pop(name, None)
        if parked is not None:
            state.restore(parked.tensors, parked.counters)
            state.reset_basis()
        self.states[name] = state
        parameter.requires_grad_(True)
        layer = self._linear_maps.get(id(parameter)) if state.accepts_factors else None
        hook = parameter.register_post_accumulate_grad_hook(partial(self._take, state, layer is not None))
        listeners = [self._patches.add(hook.remove)]
        if layer is not None:
            # The method is looked up when it is called, so that a measurement can replace it.
            listeners.append(tap(layer, lambda left, other: state.accumulate_factored(left, other), self._patches))
        self._listeners[name] = listeners

    def _leave(self, name: str, step: int) -> float:
        state = self.states.pop(name)
        self._stop_listening(name)
        state.parameter.requires_grad_(False)
        state.parameter.grad = None
        lost = state.write_back(step)
        if self.on_switch != "drop":
            device = torch.device("cpu") if self.on_switch == "host" else state.parameter.device
            self.parked[name] = Parked({key: t.to(device) for key, t in state.tensors().items()}, state.counters())
        return lost

    def _stop_listening(self, name: str) -> None:
        for undo in self._listeners.pop(name, ()):
            undo()

    def remove(self) -> None:
        """Remove all hooks and replaced forwards; state stays. For a run that ends with parameters active."""
        for name in list(self._listeners):
            self._stop_listening(name)

    def _take(self, state: ParameterState, tapped: bool, parameter: Tensor) -> None:
        """Hook: accumulate a parameter's gradient and free it."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            assert tapped, f"{state.name}: its gradient was taken before the optimizer's hook ran"
            return  # its factors were accumulated
        state.accumulate(gradient, last=self._last_micro_batch, step=self._step)

    # -- a step ------------------------------------------------------------------------------------------------------

    def micro_batch(self, step: int, *, last: bool) -> None:
        """Announce the next backward.

        Other processes may still have gradients after this one's last: a new basis then waits for `gradient_norm`.

        Args:
            step: global step, from 0.
            last: whether it is the step's last micro-batch in this process.
        """
        self._step, self._last_micro_batch = step, last and self.add_up is None

    def gradient_norm(self) -> Tensor:
        """Norm over everything accumulated in this step, by all processes; projected gradients in their own space."""
        if self.add_up is not None:
            self._add_up(self.add_up)
        for state in self.states.values():
            state.refresh_basis(self._step)
        parts = [state.norm_squared() for state in self.states.values()]
        device = next((part.device for part in parts if part is not None), torch.device("cpu"))
        zero = torch.zeros((), device=device)
        self._squares = torch.stack([zero if part is None else part.to(device) for part in parts]) if parts else None
        return zero if self._squares is None else self._squares.sum().sqrt()

    def _add_up(self, add_up: Callable[[Sequence[Tensor]], None]) -> None:
        """Sum what the processes accumulated, but for parameters that got a gradient on none of them."""
        states = list(self.states.values())
        present = torch.tensor([float(state.has_gradient) for state in states])
        add_up([present])
        add_up([state.pending() for state, count in zip(states, present.tolist(), strict=True) if count])

    def update(self, lr: float, clip: float | None, norm: Tensor | None = None) -> None:
        """Update every active parameter.

        Args:
            lr: learning rate.
            clip: gradients are scaled so that their norm is at most this; None for no limit.
            norm: what `gradient_norm` returned for this step; None to compute it.
        """
        norm = self.gradient_norm() if norm is None else norm
        factor: Tensor | float = 1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        if self._squares is not None:
            seen, device = self._seen, self._squares.device
            self._seen = self._squares if seen is None else self._squares + seen.to(device)
            self._updates_seen, self._squares = self._updates_seen + 1, None
        for state in self.states.values():
            state.update(lr, factor, self._step)

    def take_norms(self) -> tuple[dict[str, float], int]:
        """Gradient norms since the last call or `switch`; reading them waits for the device once.

        Returns:
            Squared norms by active parameter, summed over the updates, and the number of updates.
        """
        sums = [0.0] * len(self.states) if self._seen is None else self._seen.tolist()
        updates, self._seen, self._updates_seen = self._updates_seen, None, 0
        return dict(zip(self.states, sums, strict=True)), updates

    # -- state -------------------------------------------------------------------------------------------------------

    def held(self) -> HeldBytes:
        """Bytes of the active states (parked state is counted by `parked_bytes`)."""
        return sum((state.held() for state in self.states.values()), HeldBytes())

    def parked_bytes(self) -> int:
        """Bytes of the state that waits for its parameters' next activation."""
        return sum(t.nbytes for parked in self.parked.values() for t in parked.tensors.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a bit-exact continuation needs.

        Returns:
            Tensors by `kind|name|field`, and counters as JSON.
        """
        tensors: dict[str, Tensor] = {}
        counters: dict[str, Any] = {"active": {}, "parked": {}, "updates_seen": self._updates_seen}
        if self._seen is not None:
            tensors["seen||squares"] = self._seen
        for name, state in self.states.items():
            counters["active"][name] = state.counters()
            tensors |= {f"active|{name}|{key}": t for key, t in state.tensors().items()}
        for name, parked in self.parked.items():
            counters["parked"][name] = dict(parked.counters)
            tensors |= {f"parked|{name}|{key}": t for key, t in parked.tensors.items()}
        return tensors, counters

    def load_state(
        self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], specs: Mapping[str, UpdateSpec]
    ) -> None:
        """Replace the state by a saved one.

        Args:
            tensors: tensors that `state` returned.
            counters: counters that `state` returned.
            specs: how each parameter that was active is updated, by name.
        """
        self.remove()
        for name in self.states:
            self.parameters[name].requires_grad_(False)
        self.states.clear()
        fields: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name, part = key.split("|")
            fields.setdefault((kind, name), {})[part] = tensor
        for name, counts in counters["active"].items():
            self._join(name, specs[name])
            self.states[name].restore(fields["active", name], counts)
        for name, counts in counters["parked"].items():
            self.parked[name] = Parked(fields["parked", name], dict(counts))
        self._seen, self._updates_seen = fields.get(("seen", ""), {}).get("squares"), counters.get("updates_seen", 0)
