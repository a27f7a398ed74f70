"""What every method promises, on one tiny model of five blocks, 64 wide: one test a promise, one row a method.

Defaults everywhere (no --set) but for the rows of `VARIANTS`. Whole runs are shared between the tests of a row.
"""

from pathlib import Path

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore
from owlore.choices import METHODS
from owlore.config import TrainConfig
from owlore.strategies import STRATEGIES
from owlore.training.trainer import Trainer

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
COMMON = {"steps": 7, "batch": 8, "lr": 1e-2, "seed": 1, "save_every": 5, "keep": 3, "eval_data": 0.25}
SAMPLED = {"every": 3, "table": "uniform"}  # five steps end inside the second period
VARIANTS = {  # row: (method, settings)
    "owlore with fira": ("owlore", {"set": {"residual": "fira"}}),
}
ADAPTERS = [name for name in METHODS if STRATEGIES[name].adapts]
OWN = [name for name in METHODS if name not in ADAPTERS] + list(VARIANTS)
EVERY = [*METHODS, *VARIANTS]
IDS = torch.arange(4, 24)[None]


def settings(row, **changes):
    method, variant = VARIANTS.get(row, (row, {}))
    sampled = SAMPLED if "every" in STRATEGIES[method].accepted_options else {}
    return {"method": method, **COMMON, **sampled, **variant, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("contract") / "model", blocks=5, width=64)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The run of a method, made once."""
    runs = {}

    def get(method):
        if method not in runs:
            out = tmp_path_factory.mktemp("runs") / method
            runs[method] = owlore.train(model, ROWS, out=out, **settings(method))
        return runs[method]

    return get


def plain(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_every_known_method_is_a_row_here():
    assert set(METHODS) == set(STRATEGIES)


@pytest.mark.parametrize("method", EVERY)
def test_the_held_out_loss_falls(finished, method):
    record = finished(method).record
    assert record["eval_loss_last"] < record["eval_loss_first"] - 0.02


@pytest.mark.parametrize("method", OWN)
def test_what_was_not_trained_is_bit_identical_and_what_was_drawn_changed(model, finished, method):
    run = finished(method)
    before, after = (load_file(d / "model.safetensors") for d in (model, run.directory / "model"))
    always = run.record["config"]["always_on"]
    for name in before:
        inside = ".layers." in name
        drawn = run.record["draws"][int(name.split(".")[2])] > 0 if inside else bool(always)
        assert torch.equal(before[name], after[name]) != drawn, name


@pytest.mark.parametrize("method", ADAPTERS)
def test_without_its_adapter_the_model_is_the_base_again(model, finished, method):
    """Bit for bit, but for QDoTA, whose base rests in four bits: there it is what quantisation alone left of it."""
    run = finished(method)
    with run.model.disable_adapter():
        left = logits(run.model)
    if method == "qdota":
        config = run.model.peft_config["default"]
        fresh = STRATEGIES["qdota"].prepare(plain(model), _start(run))
        assert config.quantise == "nf4"
        with fresh.wrapper.disable_adapter():
            assert torch.equal(left, logits(fresh.wrapper))
    else:
        assert torch.equal(left, logits(plain(model)))
    assert not torch.equal(left, logits(run.model))


def _start(run):
    from owlore.strategies import PrepareContext

    config = run.record["config"]
    return PrepareContext(options=config["set"], seed=config["seed"], batches=lambda count: iter(()))


@pytest.mark.parametrize("method", EVERY)
def test_a_run_stopped_inside_a_period_goes_on_bit_for_bit(model, finished, tmp_path, method):
    """The run is cut off after its sixth step as a kill would: what is on disk is the checkpoint of the fifth."""
    whole = finished(method)

    class Killed(BaseException):
        pass

    advance = Trainer.train_step

    def dying(self):
        if self.step == 6:
            raise Killed
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(Killed):
            owlore.train(model, ROWS, out=tmp_path / "run", **settings(method))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000005"]
    again = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **settings(method))
    for name in ("weights", "optimizer"):
        a, b = (load_file(r.directory / f"checkpoints/step-000007/{name}.safetensors") for r in (whole, again))
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert again.history["loss"].tolist() == whole.history["loss"].tolist()
    assert again.record["periods"] == whole.record["periods"] and again.record["tables"] == whole.record["tables"]
    assert torch.equal(logits(again.model), logits(whole.model))


@pytest.mark.parametrize("method", EVERY)
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(model, tmp_path, method):
    """SMT's scores are means over micro-batches of |g|, another function of another batch, so its map is held fixed."""
    losses = []
    for batch, accum in ((8, 1), (2, 4)):
        own = {"set": {"selection": "magnitude"}} if method == "smt" else {}
        changed = settings(method, steps=4, batch=batch, accum=accum, lr=1e-3, **own)
        run = owlore.train(model, ROWS, out=tmp_path / f"{batch}x{accum}", **changed)
        losses.append([r["loss"] for r in run.rows if r["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("method", EVERY)
def test_planned_bytes_are_the_bytes_counted(model, tmp_path, monkeypatch, method):
    """Weights, masters, moments and projectors, at every step; a sampled method draws blocks of one size."""
    from owlore.plan.model_spec import weight_bytes
    from owlore.plan.planner import plan_from_config

    counted = []
    advance = Trainer.train_step

    def counting(self):
        row = advance(self)
        held = self.rotation.optimizer.held()
        counted.append((weight_bytes(self.parts.model, self.injected), held.masters, held.moments + held.projectors))
        return row

    monkeypatch.setattr(Trainer, "train_step", counting)
    changed = settings(method, steps=4)
    owlore.train(model, ROWS, out=tmp_path / "run", **changed)
    config = TrainConfig.build({"model": str(model), **changed})
    planned = plan_from_config(config, lambda message: None)
    sizes = planned.bytes
    assert set(counted) == {(sizes["weights"], sizes["masters"], sizes["optimizer"])}


@pytest.mark.parametrize("method", EVERY)
def test_the_plans_trainable_share_is_the_runs(model, finished, method):
    from owlore.plan.planner import plan_from_config

    planned = plan_from_config(TrainConfig.build({"model": str(model), **settings(method)}), lambda message: None)
    assert planned.trainable["per_step"] == pytest.approx(finished(method).record["trainable"], rel=1e-6)


@pytest.mark.parametrize("method", OWN)
def test_the_export_gives_the_same_logits_in_plain_transformers(finished, method):
    run = finished(method)
    assert torch.equal(logits(plain(run.directory / "model")), logits(run.model))


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_adapter_gives_the_same_logits_in_peft_and_merges(model, finished, tmp_path, method):
    from peft import PeftModel

    from owlore.merge import merge

    run = finished(method)
    own = logits(run.model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain(model), run.directory / "model")), own)
    merged = merge(run.directory, tmp_path / "merged", device=torch.device("cpu"))
    found = logits(plain(tmp_path / "merged"))
    # QDoTA is merged into the unquantised base: what NF4 took away comes back.
    assert (found - own).abs().max() <= (1.0 if method == "qdota" else 1e-4) * own.abs().max()
    assert merged.max_difference <= (1.0 if method == "qdota" else 1e-4) * merged.max_logit
    names = [sorted(file.name for file in place.iterdir()) for place in (tmp_path / "merged", model)]
    assert names[0] == names[1]
