"""Tables by period: what a run records of its periods, and a rule that draws by it."""

import os
import signal

import numpy as np
import pytest
import torch
from makers import save_tiny, tiny_llama
from safetensors.torch import load_file

import owlore
from htsr.errors import Interrupted
from owlore.blocks import find_parts, freeze
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.sampling import draw, inclusion
from owlore.strategies import STRATEGIES
from owlore.strategies.base import Sampled
from owlore.training.loss import CausalLoss
from owlore.training.trainer import Trainer

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
SETTINGS = {"method": "badam", "steps": 14, "every": 3, "active": 2, "draw": "exact", "lr": 1e-3, "batch": 4}


class ByNorm(Sampled):
    """Draws in proportion to the last norm seen of each block; blocks not seen yet count as the largest."""

    name, paper, summary = "badam", "none", "a rule for this test"
    defaults = {"active": 2}

    def next_inclusion(self, finished):
        scores = np.zeros(self.parts.num_blocks)
        for period in finished:
            scores[list(period.blocks)] = period.norms
        scores[scores == 0] = scores.max() or 1.0
        return inclusion(scores, 2)


@pytest.fixture
def adaptive(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "badam", ByNorm)


def test_the_recorded_norms_are_those_of_the_gradients(tmp_path):
    run = owlore.train(save_tiny(tmp_path / "model", blocks=5), ROWS, out=tmp_path / "run", **SETTINGS)
    past = run.record["periods"]
    assert [p["period"] for p in past] == [0, 1, 2, 3, 4] and [p["steps"] for p in past] == [3, 3, 3, 3, 2]
    train = run.history.query("split == 'train'")
    for finished in past:
        rows = train[(train["step"] - 1) // 3 == finished["period"]]
        assert all(list(blocks) == finished["blocks"] for blocks in rows["active_blocks"])
        # Nothing but the drawn blocks is trained, so their squares sum to the gradient's.
        total = sum(norm**2 for norm in finished["norms"])
        assert total == pytest.approx(float((rows["grad_norm"] ** 2).mean()), rel=1e-5)
    assert run.record["tables"] == []  # the rule does not adapt


def test_norms_by_parameter_are_the_sums_of_squares_of_what_autograd_gives():
    model = tiny_llama(blocks=3)
    freeze(model)
    parts = find_parts(model)
    names = parts.parameters((0, 2), ())
    optimizer = RotatingOptimizer(parts.parameters(range(3), ()), seed=0)
    optimizer.switch(dict.fromkeys(names, UpdateSpec()), 0)
    expected = dict.fromkeys(names, 0.0)
    for step in range(2):
        ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(step))
        gradients = torch.autograd.grad(CausalLoss(model)(ids, ids), list(names.values()))
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += float(gradient.square().sum())
        CausalLoss(model)(ids, ids).backward()
        optimizer.update(1e-3, 1.0)
    sums, updates = optimizer.take_norms()
    assert updates == 2 and sums == pytest.approx(expected, rel=1e-4)
    assert optimizer.take_norms() == (dict.fromkeys(names, 0.0), 0)


def test_an_adaptive_draw_is_a_pure_function_of_what_is_recorded(tmp_path, adaptive):
    run = owlore.train(save_tiny(tmp_path / "model", blocks=5), ROWS, out=tmp_path / "run", **SETTINGS)
    past, tables = run.record["periods"], run.record["tables"]
    assert len(tables) == len(past) == 5
    assert len({tuple(table) for table in tables}) > 1  # it did adapt
    for finished, table in zip(past, tables, strict=True):
        assert sum(table) == pytest.approx(2)
        assert list(draw(np.array(table), 0, finished["period"])) == finished["blocks"]


@pytest.mark.parametrize("at", [4, 6, 7])  # inside a period, after its last step, after the first of the next
def test_an_adaptive_run_goes_on_bit_for_bit(tmp_path, adaptive, at):
    model = save_tiny(tmp_path / "model", blocks=5)
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **SETTINGS)
    advance = Trainer.train_step

    def interrupting(self):
        if self.step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupting)
        with pytest.raises(Interrupted):
            owlore.train(model, ROWS, out=tmp_path / "run", **SETTINGS)
    resumed = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **SETTINGS)
    for key in ("periods", "tables", "draws"):
        assert whole.record[key] == resumed.record[key]
    a, b = (load_file(run.directory / "model/model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
