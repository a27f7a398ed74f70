"""Linear maps that give their gradient projected: the same numbers, and no gradient of the weight's size."""

import copy

import pytest
import torch
from makers import generator
from torch import nn
from transformers.pytorch_utils import Conv1D

from owlore.optim import RotatingOptimizer, UpdateSpec

INPUTS, OUTPUTS = 40, 24
RULE = UpdateSpec(rank=4, refresh=3)


class Maps(nn.Module):
    """Two linear maps, one stored transposed; a norm between them whose gradient is not projected."""

    def __init__(self, *, bias=True, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(INPUTS, OUTPUTS, bias=bias)
        self.norm = nn.LayerNorm(OUTPUTS)
        self.second = Conv1D(INPUTS, OUTPUTS)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(index)) / 5)
        self.to(dtype)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


def trained(model, *, layers, steps=7, micro=2, rule=RULE, context=None, **settings):
    """The optimizer after some steps over this model's parameters; squared gradient norms by step and name."""
    parameters = dict(model.named_parameters())
    optimizer = RotatingOptimizer(parameters, seed=0, layers=[model] if layers else [], **settings)
    optimizer.switch(dict.fromkeys(parameters, rule), 0)
    scale, norms = settings.get("grad_scale", 1.0), []
    for step in range(steps):
        for index in range(micro):
            x = torch.randn(3, 5, INPUTS, generator=generator(10 * step + index)).to(model.norm.weight.dtype)
            optimizer.micro_batch(step, last=index == micro - 1)
            if context is None:
                (model(x).square().mean() * scale).backward()
            else:
                with context():
                    out = model(x)
                out.float().square().mean().backward()
        norms.append(float(optimizer.gradient_norm()))
        optimizer.update(1e-2, 1.0)
    return optimizer, norms


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro": 1},
        {"bias": False},
        {"grad_scale": 256.0},
        {"rule": UpdateSpec(rank=4, larger=True)},
        {"rule": UpdateSpec(rank=4, refresh=1)},
        {"rule": UpdateSpec()},
        {"rule": UpdateSpec(rank=20)},
        {"rule": UpdateSpec(rank=4, full_rank="fira")},
    ],
    ids=str,
)
def test_steps_are_those_of_projected_gradients(settings):
    bias = {"bias": settings.pop("bias")} if "bias" in settings else {}
    ours, usual = Maps(**bias), Maps(**bias)
    _, norms = trained(ours, layers=True, **settings)
    _, expected = trained(usual, layers=False, **settings)
    assert norms == pytest.approx(expected, rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), usual.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), name


def test_the_step_that_finds_a_basis_is_the_usual_one_to_the_bit():
    ours, usual = Maps(), Maps()
    trained(ours, layers=True, steps=1)
    trained(usual, layers=False, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), usual.parameters(), strict=True))


def test_on_the_cpu_16_bit_gradients_are_made_and_projected_as_ever():
    ours, usual = Maps(dtype=torch.bfloat16), Maps(dtype=torch.bfloat16)
    trained(ours, layers=True)
    trained(usual, layers=False)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), usual.parameters(), strict=True))


def test_under_autocast_the_gradient_goes_its_usual_way():
    ours, usual = Maps(), Maps()

    def context():
        return torch.autocast("cpu", torch.bfloat16)

    trained(ours, layers=True, context=context)
    trained(usual, layers=False, context=context)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), usual.parameters(), strict=True))


def test_a_part_of_the_gradient_that_comes_from_another_reader_is_added():
    class TwoReaders(Maps):
        def forward(self, x):
            return super().forward(x) + x @ self.first.weight.T @ self.second.weight

    ours, usual = TwoReaders(), TwoReaders()
    trained(ours, layers=True)
    trained(usual, layers=False)
    for (name, a), b in zip(ours.named_parameters(), usual.named_parameters(), strict=True):
        assert torch.allclose(a, b[1], atol=2e-6), name


def test_a_matrix_that_two_maps_share_is_left_alone():
    model = Maps()
    model.other = nn.Linear(INPUTS, OUTPUTS)
    model.other.weight = model.first.weight
    optimizer = RotatingOptimizer(dict(model.named_parameters()), seed=0, layers=[model])
    optimizer.switch({"first.weight": RULE, "second.weight": RULE}, 0)
    assert "forward" not in vars(model.first) and "forward" not in vars(model.other)
    assert "forward" in vars(model.second)


def test_only_matrices_that_are_projected_and_gain_by_it_are_tapped_and_for_as_long_as_they_are_trained():
    model = Maps()
    optimizer = RotatingOptimizer(dict(model.named_parameters()), seed=0, layers=[model])
    optimizer.switch({"first.weight": RULE, "first.bias": RULE, "second.weight": UpdateSpec(rank=4)}, 0)
    assert "forward" in vars(model.first) and "forward" in vars(model.second)
    optimizer.switch({"first.weight": RULE}, 1)
    assert "forward" in vars(model.first) and "forward" not in vars(model.second)
    optimizer.switch({}, 2)
    assert "forward" not in vars(model.first)
    for rule in (UpdateSpec(), UpdateSpec(rank=20), UpdateSpec(rank=4, full_rank="apollo")):  # 20 * (40 + 24) > 40 * 24
        optimizer.switch({"first.weight": rule}, 3)
        assert "forward" not in vars(model.first)
        optimizer.switch({}, 4)


def test_a_map_that_computes_something_of_its_own_is_left_alone():
    model = Maps()
    own = model.second.forward = lambda x, forward=model.second.forward: forward(x)
    optimizer = RotatingOptimizer(dict(model.named_parameters()), seed=0, layers=[model])
    optimizer.switch({"first.weight": RULE, "second.weight": RULE}, 0)
    assert "forward" in vars(model.first) and vars(model.second)["forward"] is own
    optimizer.switch({}, 1)
    assert vars(model.second)["forward"] is own


def test_what_is_put_on_a_map_later_and_taken_off_first_is_gone_in_between_as_before():
    """A quantised block's maps read their weights through a forward of the store's, which training is put on."""
    model = Maps()
    optimizer = RotatingOptimizer(dict(model.named_parameters()), seed=0, layers=[model])
    later = model.second.forward = lambda x, forward=model.second.forward: forward(x)
    optimizer.switch({"second.weight": RULE}, 0)
    assert vars(model.second)["forward"] is not later
    optimizer.switch({}, 1)
    assert vars(model.second)["forward"] is later


def test_a_restored_optimizer_listens_again_and_once():
    first, second = Maps(), Maps()
    going, _ = trained(first, layers=True, steps=5)
    second.load_state_dict(first.state_dict())
    restored = RotatingOptimizer(dict(second.named_parameters()), seed=0, layers=[second])
    rules = dict.fromkeys(going.parameters, RULE)
    restored.switch(rules, 0)
    restored.load_state(*copy.deepcopy(going.state()), rules)
    x = torch.randn(3, 5, INPUTS, generator=generator(77))
    for model, optimizer in ((first, going), (second, restored)):
        optimizer.micro_batch(5, last=True)
        model(x).square().mean().backward()
        optimizer.update(1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    model = Maps()
    optimizer, _ = trained(model, layers=True, steps=2)
    optimizer.micro_batch(2, last=True)
    (model(torch.randn(2, 3, INPUTS)).square().mean() * float("nan")).backward()
    assert not torch.isfinite(optimizer.gradient_norm())


def test_an_input_without_gradient_and_one_without_rows_are_taken():
    """The lowest trained block's input needs none; an expert may be given no token."""
    model = Maps()
    optimizer, _ = trained(model, layers=True, steps=1)
    optimizer.micro_batch(1, last=True)
    model.first(torch.empty(0, INPUTS)).sum().backward()
    assert optimizer.states["first.weight"].accumulated.count_nonzero() == 0
    x = torch.randn(4, INPUTS, requires_grad=True)
    model.first(x).sum().backward()
    assert torch.allclose(x.grad, model.first.weight.detach().sum(0).expand_as(x), atol=1e-5)
