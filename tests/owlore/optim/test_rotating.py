"""The rotating optimizer: state follows the active set; projecting, accumulating and clipping are exact."""

from dataclasses import replace

import paper
import pytest
import torch
from makers import generator
from torch import nn

from owlore.kernels.adamw import AdamW
from owlore.kernels.projector import project
from owlore.optim import MasterPolicy, RotatingOptimizer, UpdateSpec
from owlore.optim.update_spec import planned_state_bytes

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16), "vector": (12,), "small": (6, 4)}
PROJECTED = UpdateSpec(rank=6)


def parameters(dtype=torch.float32):
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator(i)).to(dtype), requires_grad=False)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def step(optimizer, gradients, index=0, lr=1e-2, clip=None):
    """One step from lists of micro-batch gradients, sent through autograd so that the hooks run."""
    count = len(next(iter(gradients.values())))
    for i in range(count):
        optimizer.micro_batch(index, last=i == count - 1)
        loss = sum(
            (optimizer.parameters[n] * g[i].to(optimizer.parameters[n].dtype)).sum() for n, g in gradients.items()
        )
        loss.backward()
    norm = optimizer.gradient_norm()
    optimizer.update(lr, clip, norm)
    return float(norm)


def random_gradients(names, seed, micro=1):
    return {n: [torch.randn(SHAPES[n], generator=generator(97 * seed + i)) for i in range(micro)] for n in names}


def test_unprojected_updates_are_adamw():
    weights = parameters()
    start = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch(dict.fromkeys(weights, UpdateSpec(adam=AdamW(decay=0.1))), 0)
    history = [random_gradients(weights, seed) for seed in range(10)]
    for index, gradients in enumerate(history):
        step(optimizer, gradients, index)
    for name, p in weights.items():
        truth = paper.adamw(start[name], [g[name][0] for g in history], 1e-2, 0.9, 0.999, 1e-8, 0.1)
        assert torch.allclose(p.detach().double(), truth, atol=1e-6)


@pytest.mark.parametrize(("name", "larger"), [(n, False) for n in ("tall", "wide", "square")]
                         + [("tall", True), ("wide", True)])  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_projected_updates_follow_galores_algorithm(name, larger, scale):
    weights = parameters()
    start = weights[name].detach().clone()
    optimizer = RotatingOptimizer(weights, seed=0)
    rule = UpdateSpec(rank=6, scale=scale, larger=larger)
    optimizer.switch({name: rule}, 0)
    gradients = [torch.randn(SHAPES[name], generator=generator(i)) for i in range(8)]
    for index, gradient in enumerate(gradients):
        step(optimizer, {name: [gradient]}, index)
    basis = optimizer.states[name].basis
    truth = paper.galore_adamw(start, gradients, basis, 1e-2, scale, 0.9, 0.999, 1e-8)
    assert torch.allclose(weights[name].detach().double(), truth, atol=2e-6)
    assert optimizer.held() == planned_state_bytes(SHAPES[name], torch.float32, rule, MasterPolicy.MASTER)


def test_full_rank_projection_with_the_identity_as_basis_is_adamw():
    weights = parameters()
    start = weights["square"].detach().clone()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"square": UpdateSpec(rank=15)}, 0)
    state = optimizer.states["square"]
    state.basis, state.basis_age = torch.eye(16), 0
    state.moments.write(torch.zeros(16, 16), torch.zeros(16, 16))
    gradients = [torch.randn(16, 16, generator=generator(i)) for i in range(6)]
    for index, gradient in enumerate(gradients):
        step(optimizer, {"square": [gradient]}, index)
    truth = paper.adamw(start, gradients, 1e-2, 0.9, 0.999, 1e-8, 0.0)
    assert torch.allclose(weights["square"].detach().double(), truth, atol=1e-6)


def with_basis(basis, **adam):
    """An optimizer over `square` (16 x 16) whose basis is this one from the start, and the matrix's first value."""
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch(
        {"square": UpdateSpec(rank=15, adam=AdamW(**adam))}, 0
    )  # 15 < 16 has the state projected; the basis is full
    state = optimizer.states["square"]
    state.basis, state.basis_age = basis, 0
    state.moments.write(torch.zeros(16, 16), torch.zeros(16, 16))
    return optimizer, weights["square"].detach().clone()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_rank_projection_with_any_orthonormal_basis_is_momentum_sgd(seed):
    """Adam with an epsilon that dwarfs every sqrt(v) is momentum SGD (with bias correction) at lr / epsilon."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator(seed))).Q
    huge = 2.0**40
    optimizer, start = with_basis(basis, eps=huge)
    expected, momentum = start.double(), torch.zeros(16, 16, dtype=torch.float64)
    for index in range(8):
        gradient = torch.randn(16, 16, generator=generator(100 * seed + index))
        step(optimizer, {"square": [gradient]}, index, lr=1e-2 * huge)
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        expected -= 1e-2 * momentum / (1 - 0.9 ** (index + 1))
    assert torch.allclose(optimizer.parameters["square"].detach().double(), expected, atol=1e-6)


def test_adam_is_not_rotation_invariant_so_another_full_basis_is_not_adamw():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator(3))).Q
    optimizer, start = with_basis(basis)
    gradients = [torch.randn(16, 16, generator=generator(i)) for i in range(4)]
    for index, gradient in enumerate(gradients):
        step(optimizer, {"square": [gradient]}, index)
    plain = paper.adamw(start, gradients, 1e-2, 0.9, 0.999, 1e-8, 0.0)
    assert (optimizer.parameters["square"].detach().double() - plain).abs().max() > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 1, 2])  # a first basis is due, none is due, a refresh is due
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_spoils_no_state(bad, when):
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"tall": UpdateSpec(rank=6, refresh=2)}, 0)
    for index in range(when):
        step(optimizer, random_gradients(("tall",), index), index)
    before, (state, _) = weights["tall"].detach().clone(), optimizer.state()
    state = {name: tensor.clone() for name, tensor in state.items() if not name.startswith("seen")}
    gradient = torch.randn(SHAPES["tall"], generator=generator(9))
    gradient[3, 4] = bad
    optimizer.micro_batch(when, last=True)
    (weights["tall"] * gradient).sum().backward()
    assert not torch.isfinite(optimizer.gradient_norm())
    assert torch.equal(weights["tall"], before)
    after, _ = optimizer.state()
    assert all(torch.equal(state[name], after[name]) for name in state)


@pytest.mark.parametrize("rank_of", [0, 1, 3])
def test_rank_deficient_gradients_are_followed_like_any_other(rank_of):
    weights = parameters()
    start = weights["tall"].detach().clone()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"tall": UpdateSpec(rank=6, refresh=2)}, 0)
    for index in range(6):
        left = torch.randn(24, rank_of, generator=generator(index))
        right = torch.randn(rank_of, 10, generator=generator(50 + index))
        step(optimizer, {"tall": [left @ right]}, index)
        basis = optimizer.states["tall"].basis
        assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)
    assert torch.isfinite(weights["tall"]).all()
    assert torch.equal(weights["tall"], start) == (rank_of == 0)


@pytest.mark.parametrize(
    "rule", [UpdateSpec(), PROJECTED, UpdateSpec(rank=6, refresh=2)], ids=["plain", "projected", "refreshed"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_micro_batches_are_one_batch_of_their_sum(rule, dtype):
    results = []
    for split in (True, False):
        weights = parameters(dtype)
        optimizer = RotatingOptimizer(weights, seed=0)
        optimizer.switch(dict.fromkeys(weights, rule), 0)
        for index in range(5):
            # Multiples of 1/4 sum exactly in 16 bits, so both ways see the same whole gradient.
            parts = {n: [torch.round(2 * g) / 4 for g in gs] for n, gs in random_gradients(weights, index, 4).items()}
            step(optimizer, parts if split else {n: [sum(gs)] for n, gs in parts.items()}, index, clip=1.0)
        results.append(
            {n: s.master if s.master is not None else s.parameter.detach() for n, s in optimizer.states.items()}
        )
    for name in SHAPES:
        assert torch.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-6), name


def test_state_bytes_are_a_function_of_the_active_set_at_every_switch():
    weights = parameters(torch.bfloat16)
    optimizer = RotatingOptimizer(weights, seed=0)
    seen = {}
    choices = [("tall", "vector"), ("wide",), ("square", "small"), ("tall", "wide", "square"), ()]
    for period in range(60):
        names = choices[(period * 7) % len(choices)]
        optimizer.switch(dict.fromkeys(names, PROJECTED), period)
        if names:
            step(optimizer, random_gradients(names, period), period)
        held = optimizer.held()
        planned = [planned_state_bytes(SHAPES[n], torch.bfloat16, PROJECTED, MasterPolicy.MASTER) for n in names]
        assert held.total == sum(p.total for p in planned)
        assert held.masters == sum(p.masters for p in planned)
        assert seen.setdefault(names, held) == held
        frozen = [p for n, p in weights.items() if n not in names]
        assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_frozen_weights_keep_their_bits_and_drawn_ones_change():
    weights = parameters(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in weights.items()}
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"tall": PROJECTED, "vector": PROJECTED}, 0)
    for index in range(3):
        step(optimizer, random_gradients(("tall", "vector"), index), index)
    optimizer.switch({}, 3)
    for name, p in weights.items():
        assert torch.equal(p, before[name]) == (name not in ("tall", "vector"))


def test_no_gradient_outlives_its_hook():
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch(dict.fromkeys(weights, PROJECTED), 0)
    for index in range(3):
        optimizer.micro_batch(index, last=True)
        sum((p * 2).sum() for p in weights.values()).backward()
        assert all(p.grad is None for p in weights.values())
        assert all(getattr(state, "full_gradient", None) is None for state in optimizer.states.values())
        assert optimizer.states["tall"].accumulated.shape == (24, 6)
        optimizer.update(1e-3, None)


def test_a_basis_lives_for_one_activation_and_moments_rotate_when_a_block_stays():
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"tall": PROJECTED}, 0)
    for index in range(4):
        step(optimizer, random_gradients(("tall",), index), index)
        if index == 0:
            first = optimizer.states["tall"].basis
        assert optimizer.states["tall"].basis is first
    done = optimizer.switch({"tall": PROJECTED}, 4)
    assert done.stayed == ("tall",) and optimizer.states["tall"].updates == 4
    fresh = random_gradients(("tall",), 99)
    step(optimizer, fresh, 4)
    second = optimizer.states["tall"].basis
    assert second is not first
    best = project(fresh["tall"][0], paper.galore_basis(fresh["tall"][0], 6), True).norm()
    assert project(fresh["tall"][0], second, True).norm() >= 0.99 * best


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_a_basis_is_refreshed_every_n_steps(refresh):
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    optimizer.switch({"wide": UpdateSpec(rank=4, refresh=refresh)}, 0)
    bases = []
    for index in range(6):
        step(optimizer, random_gradients(("wide",), index), index)
        bases.append(id(optimizer.states["wide"].basis))
    changes = [index for index in range(6) if index == 0 or bases[index] != bases[index - 1]]
    assert changes == list(range(0, 6, refresh))


def test_clipping_bounds_the_norm_in_the_projected_space():
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0)
    names = ("tall", "vector")
    optimizer.switch(dict.fromkeys(names, PROJECTED), 0)
    gradients = random_gradients(names, 5)
    big = {n: [100 * g for g in gs] for n, gs in gradients.items()}
    norm = step(optimizer, big, 0, clip=1.0)
    basis = optimizer.states["tall"].basis
    expected = (project(big["tall"][0], basis, True).square().sum() + big["vector"][0].square().sum()).sqrt()
    assert norm == pytest.approx(float(expected), rel=1e-5)
    moments = (
        torch.cat([optimizer.states[n].moments.read()[0].flatten() for n in names]) / 0.1
    )  # after one step m = 0.1 g
    assert float(moments.norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_updates_that_16_bits_would_lose(dtype):
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype), requires_grad=False)
    optimizer = RotatingOptimizer({"w": weight}, seed=0)
    optimizer.switch({"w": UpdateSpec()}, 0)
    for index in range(100):
        optimizer.micro_batch(index, last=True)
        (weight * torch.ones_like(weight)).sum().backward()
        optimizer.update(1e-5, None)
    assert float(optimizer.states["w"].master.mean()) == pytest.approx(1 - 100e-5, abs=2e-6)
    done = optimizer.switch({}, 100)
    assert done.lost_norm > 0
    # Stochastic write-back: the mean survives although each entry is one of two neighbours.
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 100e-5, abs=3 * 64**-1 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weights_mode", [MasterPolicy.NEAREST, MasterPolicy.STOCHASTIC])
def test_without_masters_none_is_held_and_stochastic_rounding_still_learns(weights_mode):
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16), requires_grad=False)
    optimizer = RotatingOptimizer({"w": weight}, seed=0, policy=weights_mode)
    optimizer.switch({"w": UpdateSpec()}, 0)
    for index in range(50):
        optimizer.micro_batch(index, last=True)
        (weight * torch.ones_like(weight)).sum().backward()
        optimizer.update(1e-4, None)
    assert optimizer.held().masters == 0
    moved = 1 - float(weight.detach().float().mean())
    assert moved == (0.0 if weights_mode is MasterPolicy.NEAREST else pytest.approx(50e-4, rel=0.1))


@pytest.mark.parametrize("policy", ["drop", "host", "keep"])
def test_what_happens_to_moments_at_a_switch(policy):
    weights = parameters()
    optimizer = RotatingOptimizer(weights, seed=0, on_switch=policy)
    optimizer.switch({"tall": PROJECTED}, 0)
    step(optimizer, random_gradients(("tall",), 1), 0)
    optimizer.switch({"wide": PROJECTED}, 1)
    assert (optimizer.parked_bytes() == 0) == (policy == "drop")
    optimizer.switch({"tall": PROJECTED}, 2)
    step(optimizer, random_gradients(("tall",), 2), 2)
    assert optimizer.states["tall"].updates == (1 if policy == "drop" else 2)
    assert "tall" not in optimizer.parked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_saved_state_goes_on_bit_for_bit(dtype, policy):
    rules = [
        dict.fromkeys(names, UpdateSpec(rank=6, refresh=3))
        for names in (("tall", "vector"), ("tall", "wide"), ("square",))
    ]

    def advance(optimizer, start, stop):
        for index in range(start, stop):
            if index % 4 == 0:
                optimizer.switch(rules[index // 4], index)
            step(optimizer, random_gradients(rules[index // 4], index), index, clip=1.0)

    whole = RotatingOptimizer(parameters(dtype), seed=0, on_switch=policy)
    advance(whole, 0, 12)
    first = RotatingOptimizer(parameters(dtype), seed=0, on_switch=policy)
    advance(first, 0, 6)
    tensors, counters = first.state()
    second = RotatingOptimizer({n: nn.Parameter(p.detach().clone(), False) for n, p in first.parameters.items()},
                               seed=0, on_switch=policy)  # fmt: skip
    second.load_state({key: t.clone() for key, t in tensors.items()}, counters, rules[1])
    advance(second, 6, 12)
    for name, p in whole.parameters.items():
        assert torch.equal(p, second.parameters[name])
    expected, _ = whole.state()
    found, _ = second.state()
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("rule", [UpdateSpec(bits=8), UpdateSpec(rank=6, bits=8)], ids=["plain", "projected"])
def test_moments_in_eight_bits_are_a_quarter_as_large_and_lead_nearly_the_same_way(rule):
    results = []
    for bits in (32, 8):
        weights = parameters()
        start = {n: p.detach().clone() for n, p in weights.items()}
        optimizer = RotatingOptimizer(weights, seed=0)
        optimizer.switch(dict.fromkeys(weights, replace(rule, bits=bits)), 0)
        for index in range(20):
            step(optimizer, random_gradients(weights, index), index)
        planned = [
            planned_state_bytes(SHAPES[n], torch.float32, replace(rule, bits=bits), MasterPolicy.MASTER) for n in SHAPES
        ]
        assert optimizer.held().total == sum(p.total for p in planned)
        moved = torch.cat([(weights[n].detach() - start[n]).flatten() for n in SHAPES])
        results.append((optimizer.held().moments, moved))
    (wide, exact), (narrow, coarse) = results
    assert narrow < wide  # a quarter for large matrices; these are padded to whole blocks of 256
    assert (coarse - exact).norm() <= 0.05 * exact.norm()


def test_moments_in_eight_bits_are_a_quarter_of_a_large_matrix():
    eight, full = (
        planned_state_bytes((512, 512), torch.float32, UpdateSpec(bits=b), MasterPolicy.MASTER).moments for b in (8, 32)
    )
    assert eight == pytest.approx(full / 4, rel=0.02)


def test_unknown_names_and_policies_are_refused():
    with pytest.raises(KeyError, match="nowhere"):
        RotatingOptimizer(parameters(), seed=0).switch({"nowhere": UpdateSpec()}, 0)
    with pytest.raises(ValueError, match="drop, host, keep"):
        RotatingOptimizer(parameters(), seed=0, on_switch="burn")
