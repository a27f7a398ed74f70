"""Fira's residual and APOLLO's scaling: the papers' algorithms, their norms, their state, and whole runs."""

import paper
import pytest
import torch
from makers import generator, save_tiny
from torch import nn

import owlore
from htsr.errors import UsageError
from owlore.kernels.adamw import AdamW
from owlore.kernels.full_rank_update import channel_ratios, limited, random_basis
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.optim.update_spec import MasterPolicy, planned_state_bytes

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
B = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}


def trained(weight, gradients, rule, *, parts=1):
    """The weight after our optimizer saw these gradients, each in `parts` micro-batches; and the state."""
    parameter = nn.Parameter(weight.clone())
    optimizer = RotatingOptimizer({"w": parameter}, seed=3)
    optimizer.switch({"w": rule}, 0)
    state = optimizer.states["w"]
    for step, gradient in enumerate(gradients):
        for part in range(parts):
            optimizer.micro_batch(step, last=part == parts - 1)
            state.accumulate(gradient / parts, last=part == parts - 1, step=step)
        optimizer.update(1e-2, None)
    return parameter.detach(), state


def gradients(shape, count, seed=0):
    """Growing ones, so that the limiter has something to do."""
    stream = generator(seed)
    return [torch.randn(shape, generator=stream) * 1.3**t for t in range(count)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("whole", ["fira", "apollo", "apollo-mini"])
@pytest.mark.parametrize("tall", [False, True])
def test_ten_steps_are_the_papers(whole, tall, seed):
    shape = (12, 20)
    weight, seen = torch.randn(shape, generator=generator(seed + 10)), gradients(shape, 10, seed)
    ours = [g.T.contiguous() for g in seen] if tall else seen  # the papers write the wide case
    start = weight.T.contiguous() if tall else weight
    rule = UpdateSpec(adam=AdamW(**ADAM), rank=4, scale=0.5, full_rank=whole, limit=1.05)
    found, state = trained(start, ours, rule)
    if whole == "fira":
        theirs = paper.fira(weight, seen, state.basis, 1e-2, 0.5, 1.05, **B)
    else:
        theirs = paper.apollo(weight, seen, state.basis.T, 1e-2, 0.5, 1.05, **B, mini=whole == "apollo-mini")
    torch.testing.assert_close(found.double(), theirs.T if tall else theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", ["fira", "apollo"])
def test_micro_batches_equal_one_batch(whole):
    weight, seen = torch.randn(12, 20, generator=generator(1)), gradients((12, 20), 6)
    rule = UpdateSpec(rank=4, refresh=3, full_rank=whole)
    torch.testing.assert_close(trained(weight, seen, rule)[0], trained(weight, seen, rule, parts=4)[0])


@pytest.mark.parametrize("whole", ["fira", "apollo", "apollo-mini"])
def test_what_is_held_is_what_was_planned_and_no_gradient_stays(whole):
    rule = UpdateSpec(rank=4, full_rank=whole)
    _, state = trained(torch.zeros(12, 20), gradients((12, 20), 2), rule)
    assert state.held() == planned_state_bytes((12, 20), torch.float32, rule, MasterPolicy.MASTER)
    assert state.full_gradient is None and state.accumulated is None


def test_a_gradient_inside_the_basis_has_no_residual():
    """Of rank 3 under rank 4, so that Fira is GaLore."""
    stream = generator(2)
    left = torch.randn(12, 3, generator=stream)
    seen = [left @ torch.randn(3, 20, generator=stream) for _ in range(4)]
    found = [trained(torch.zeros(12, 20), seen, UpdateSpec(rank=4, full_rank=whole))[0] for whole in ("fira", None)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_channel_without_gradient_is_left_alone():
    update, projected = torch.ones(3, 5), torch.ones(3, 5)
    projected[:, 2] = 0
    assert channel_ratios(update, projected, right=False).tolist() == [[1, 1, 0, 1, 1]]


def test_the_limiter_bounds_growth_and_lets_the_first_one_and_shrinking_through():
    change = torch.full((4, 4), 2.0)
    for previous, norm in ((0.0, 8.0), (8.0, 8.0), (20.0, 8.0), (4.0, 4.4)):
        limited_change, found = limited(change.clone(), torch.tensor(previous), 1.1)
        assert float(found) == pytest.approx(norm)
        assert float(limited_change.norm()) == pytest.approx(norm)


def test_a_random_basis_keeps_norms_on_average():
    basis = random_basis(64, 8, generator=generator(0))
    vectors = torch.randn(64, 4000, generator=generator(1))
    ratio = (basis.T @ vectors).square().sum(0) / vectors.square().sum(0)
    # Of chi-square with 8 degrees: relative spread 0.5 of a vector; one basis for all of them moves the mean less.
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("own", [{"residual": "fira"}, {"scaling": "apollo"}, {"scaling": "apollo-mini"}])
@pytest.mark.parametrize("method", ["owlore", "galore"])
def test_a_run_learns_with_it_and_resumes_bit_for_bit(tmp_path, method, own):
    from safetensors.torch import load_file

    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    sampled = {"every": 3, "active": 2, "table": "uniform"} if method == "owlore" else {"refresh": 3}
    settings = {"method": method, "set": own, "rank": 8, "batch": 8, "lr": 3e-3, "accum": 2, "scale": 1.0,
                "save_every": 5, "schedule": "constant", **sampled}  # fmt: skip
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", steps=7, **settings)
    losses = whole.history["loss"].tolist()
    assert losses[-1] < losses[0]
    resumed = owlore.train(model, ROWS, steps=7, resume=str(whole.directory / "checkpoints/step-000005"),
                           out=tmp_path / "again", **settings)  # fmt: skip
    a, b = (load_file(run.directory / "model/model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_both_at_once_are_refused(tmp_path):
    with pytest.raises(UsageError, match="one of them"):
        owlore.train("demo", ROWS, table="uniform", set={"residual": "fira", "scaling": "apollo"}, steps=1,
                     out=tmp_path / "run")  # fmt: skip
