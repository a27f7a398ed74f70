"""GaLore against `galore-torch`, its authors' optimizer, and the places where the two differ on purpose."""

import pytest
import torch
from makers import generator
from torch import nn

from owlore.kernels.adamw import AdamW
from owlore.optim import RotatingOptimizer, UpdateSpec, parameter_state

STEPS = 20
# The published optimizer adds eps to the root of the second moment before its bias is corrected, ours after: with an
# eps far below the gradients both are the same function.
EPS = 1e-12


def theirs(weights, gradients, *, gap, rank=4, scale=0.25):
    from galore_torch import GaLoreAdamW

    parameters = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": parameters, "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=1e-2, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def ours(weights, gradients, *, gap, rank=4, scale=0.25, rotate=True):
    parameters = {str(i): nn.Parameter(w.clone()) for i, w in enumerate(weights)}
    optimizer = RotatingOptimizer(parameters, seed=0)
    rule = UpdateSpec(adam=AdamW(eps=EPS), rank=rank, scale=scale, refresh=gap, rotate=rotate)
    optimizer.switch(dict.fromkeys(parameters, rule), 0)
    for step in range(STEPS):
        optimizer.micro_batch(step, last=True)
        for (name, _), gradient in zip(parameters.items(), gradients[step], strict=True):
            optimizer.states[name].accumulate(gradient.clone(), last=True, step=step)
        optimizer.update(1e-2, None)
    return [p.detach() for p in parameters.values()]


@pytest.fixture(params=[0, 1, 2])
def problem(request):
    """Matrices tall, wide and square, and their gradients of 20 steps."""
    stream = generator(request.param)
    shapes = ((24, 12), (12, 24), (16, 16))
    weights = [torch.randn(shape, generator=stream) for shape in shapes]
    return weights, [[torch.randn(shape, generator=stream) for shape in shapes] for _ in range(STEPS)]


def test_twenty_steps_of_the_standard_setting_are_galore_torchs(problem):
    """One basis for 20 steps (their gap is 200): equal whether moments would rotate or not."""
    for found, expected in zip(ours(*problem, gap=200), theirs(*problem, gap=200), strict=True):
        assert (found - expected).abs().max() <= 1e-5


def test_across_refreshes_the_two_are_equal_when_moments_stay_and_bases_are_the_same(problem, monkeypatch):
    """Moments that stay belong to axes by number, so both need the very same basis: the SVD that galore-torch takes."""

    def svd(gradient, rank, **unused):
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        return vh[:rank].T if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]

    monkeypatch.setattr(parameter_state, "find_basis", svd)
    expected = theirs(*problem, gap=5)
    for found, other in zip(ours(*problem, gap=5, rotate=False), expected, strict=True):
        assert (found - other).abs().max() <= 1e-5
    rotated = ours(*problem, gap=5, rotate=True)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(rotated, expected, strict=True))
