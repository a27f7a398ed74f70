"""Whole runs whose blocks are streamed or quantised: the same bits, exports, resumes, and bytes as planned."""

import gc

import pytest
import torch
from makers import byte_tokenizer, save_tiny, tiny_llama, tiny_models
from safetensors.torch import load_file
from streaming import SHAPES

import owlore
from owlore.training.trainer import Trainer

ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
SETTINGS = {"steps": 20, "every": 4, "active": 2, "rank": 4, "batch": 2, "accum": 2, "lr": 5e-3, "table": "uniform",
            "eval_data": 0.2, "seed": 3}  # fmt: skip
ROW = ["step", "split", "loss", "lr", "grad_norm", "tokens", "state_bytes", "active_blocks"]


def exported(run):
    return load_file(run.directory / "model/model.safetensors")


def same(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def tiny(directory, family, dtype=torch.float32):
    return save_tiny(directory, tiny_models()[family]().to(dtype))


HOST = {"residency": "host"}
SHARED = {"residency": "host", "offload_activations": True, "resident_share": 0.34}
CASES = {
    **{f"{family}, host": (family, torch.float32, HOST) for family in SHAPES},
    "llama in bf16, host": ("llama", torch.bfloat16, HOST),
    "llama, host, offloaded, a share resident": ("llama", torch.float32, SHARED),
    "llama, device, offloaded": ("llama", torch.float32, {"offload_activations": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_streamed_steps_over_five_draws_are_the_resident_ones_bit_for_bit(tmp_path, case):
    family, dtype, extra = CASES[case]
    model = tiny(tmp_path / "model", family, dtype)
    plain = owlore.train(model, ROWS, out=tmp_path / "device", **SETTINGS)
    host = owlore.train(model, ROWS, out=tmp_path / "host", **SETTINGS, **extra)
    assert plain.history[ROW].to_json() == host.history[ROW].to_json()
    assert len({tuple(blocks) for blocks in plain.history["active_blocks"]}) > 2
    assert same(exported(plain), exported(host))
    assert same(*(load_file(r.directory / "checkpoints/step-000020/optimizer.safetensors") for r in (plain, host)))
    assert same(plain.model.state_dict(), host.model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("extra", [{"residency": "host", "frozen": "nf4"}, {"frozen": "int8"}], ids=["nf4", "int8"])
def test_with_quantised_frozen_blocks_what_was_never_drawn_leaves_with_its_own_bits(tmp_path, extra, dtype):
    from transformers import AutoModelForCausalLM

    from owlore.data.prepare import prepare
    from owlore.training.evaluate import held_out_loss
    from owlore.training.loss import CausalLoss

    model = save_tiny(tmp_path / "model", tiny_llama(blocks=6, dtype=dtype))
    run = owlore.train(model, ROWS, out=tmp_path / "run", **{**SETTINGS, "steps": 8, "every": 3}, **extra)
    before, after = load_file(model / "model.safetensors"), exported(run)
    assert before.keys() == after.keys()  # no wrapper's name in a key
    drawn = {block for blocks in run.history["active_blocks"] for block in blocks}
    assert 2 <= len(drawn) < 6
    for name, tensor in before.items():
        inside = any(f"layers.{block}." in name for block in drawn)
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) != inside, name
    # Every loss says which weights it is of, and the last is of those that plain transformers loads.
    rows = run.history
    assert rows["weights"].tolist() == [extra["frozen"]] * (len(rows) - 1) + ["exact"]
    loaded = AutoModelForCausalLM.from_pretrained(run.directory / "model")
    data = prepare(ROWS, run.tokenizer, seq_len=512, eval_data=0.2, seed=3).heldout
    again = held_out_loss(CausalLoss(loaded), data, batch=2, device=torch.device("cpu"))
    assert rows["loss"].iloc[-1] == again != run.record["eval_loss_last_frozen"]
    assert same(run.model.state_dict(), loaded.state_dict())
    assert run.record["residency"]["train_loss_weights"].startswith("drawn blocks exact")


@pytest.mark.parametrize("extra", [
    {"residency": "host"},
    {"residency": "host", "frozen": "nf4", "offload_activations": True, "resident_share": 0.2},
    {"residency": "host", "frozen": "int8"},
    {"frozen": "int8"},
    {"frozen": "nf4", "offload_activations": True},
], ids=["host", "host nf4 offload share", "host int8", "int8", "nf4 offload"])  # fmt: skip
def test_a_run_goes_on_bit_for_bit_from_the_middle_of_a_period(tmp_path, extra):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=5, dtype=torch.bfloat16, attention_dropout=0.1))
    settings = {**SETTINGS, "steps": 11, "schedule": "constant", **extra}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    owlore.train(model, ROWS, out=tmp_path / "run", **{**settings, "steps": 6})
    longer = owlore.train(model, ROWS, resume=True, out=tmp_path / "run", **settings)
    assert same(exported(whole), exported(longer))
    for name in ("weights", "optimizer"):
        assert same(*(load_file(r.directory / f"checkpoints/step-000011/{name}.safetensors") for r in (whole, longer)))
    rows = [run.history[ROW].query("step > 6").reset_index(drop=True) for run in (whole, longer)]
    assert len(rows[0]) == 6 and rows[0].to_json() == rows[1].to_json()


def test_trained_blocks_may_lie_in_files_while_a_run_lasts(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=5, dtype=torch.bfloat16))
    settings = {**SETTINGS, "steps": 11, "schedule": "constant", "residency": "host", "frozen": "nf4"}
    memory = owlore.train(model, ROWS, out=tmp_path / "memory", **settings)
    assert memory.record["residency"]["host_bytes"]["overlay"] > 0
    monkeypatch.setattr("owlore.training.streamed.available_memory", lambda: 0)
    first = owlore.train(model, ROWS, out=tmp_path / "run", **{**settings, "steps": 6})
    assert list((first.directory / "overlay").iterdir())
    del first  # a model that nobody asks for is not put together, and its blocks need not be kept
    gc.collect()
    assert not (tmp_path / "run/overlay").exists()
    disk = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **settings)
    assert disk.record["residency"]["host_bytes"]["overlay"] == 0
    assert same(exported(memory), exported(disk)) and same(memory.model.state_dict(), disk.model.state_dict())


def test_a_resume_may_move_the_blocks_but_not_change_their_format(tmp_path):
    from htsr.errors import UsageError

    model = save_tiny(tmp_path / "model", tiny_llama(blocks=5))
    settings = {**SETTINGS, "steps": 11, "schedule": "constant"}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    owlore.train(model, ROWS, out=tmp_path / "run", **{**settings, "steps": 6})
    with pytest.raises(UsageError, match="frozen is 'nf4'"):
        owlore.train(model, ROWS, resume=True, out=tmp_path / "run", frozen="nf4", **settings)
    moved = owlore.train(model, ROWS, resume=True, out=tmp_path / "run", residency="host", **settings)
    assert same(exported(whole), exported(moved))


def test_a_model_object_is_trained_in_place(tmp_path):
    model = tiny_llama(blocks=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = owlore.train(model, ROWS, tokenizer=byte_tokenizer(), out=tmp_path / "run", residency="host", frozen="nf4",
                       **{**SETTINGS, "steps": 3})  # fmt: skip
    drawn = set(run.history["active_blocks"].iloc[1])
    changed = {int(n.split(".")[2]) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert run.model is model and changed == drawn
    assert "forward" not in vars(model.model.layers[0]) and "forward" not in vars(model.model.embed_tokens)


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    from htsr.errors import UsageError

    model = save_tiny(tmp_path / "model", tiny_llama(blocks=3))
    for wrong in (
        {"resident_share": 0.5},
        {"residency": "disk"},
        {"frozen": "fp8"},
        {"method": "lora", "frozen": "nf4"},
        {"frozen": "nf4", "compile": True},
    ):
        given = {key: value for key, value in SETTINGS.items() if key in ("steps", "batch")} | wrong
        with pytest.raises(UsageError):
            owlore.train(model, ROWS, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_the_best_model_of_a_quantised_run_is_chosen_among_like_and_exported(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=4))
    losses = iter([3.0, 1.0, 2.0, 9.0, 2.5])  # steps 0, 2, 4; then exported and frozen at 6
    monkeypatch.setattr(Trainer, "_held_out", lambda self, exact: next(losses))
    run = owlore.train(model, ROWS, out=tmp_path / "run", residency="host", frozen="nf4", eval_every=2, keep_best=True,
                       **{**SETTINGS, "steps": 6, "every": 2})  # fmt: skip
    assert run.record["eval_best"] == {"step": 2, "loss": 1.0} and run.record["exported_step"] == 2
    saved = load_file(run.directory / "checkpoints/step-000002/weights.safetensors")
    found = exported(run)
    assert saved and all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
def test_a_drawn_block_gives_its_gradients_by_their_factors_in_a_streamed_run_too(tmp_path, monkeypatch, frozen):
    """A forward that is replaced before the optimizer looks for linear maps would hide them, and change roundings."""
    from owlore.optim.parameter_state import ProjectedState

    taken, accumulate_factored = [], ProjectedState.accumulate_factored

    def watched(state, left, right):
        taken.append(state.name)
        return accumulate_factored(state, left, right)

    monkeypatch.setattr(ProjectedState, "accumulate_factored", watched)
    model = save_tiny(tmp_path / "model", blocks=3, width=64, hidden=96)
    rows = [{"prompt": "one two", "completion": " three four"}] * 4
    owlore.train(model, rows, out=tmp_path / "run", table="uniform", active=1, steps=2, every=2, rank=4, batch=2,
                 residency="host", frozen=frozen)  # fmt: skip
    assert taken
