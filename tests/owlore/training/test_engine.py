"""The engine on tiny models: accumulation, what changes, what is held, errors, held-out loss."""

import gc
import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from live_tensors import LiveTensors
from makers import save_tiny, tiny_llama
from safetensors.torch import load_file

import owlore
from owlore.blocks import find_parts, freeze
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.optim.parameter_state import ProjectedState
from owlore.training.loss import CausalLoss

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


@pytest.mark.parametrize(("rank", "refresh"), [(4, "per-activation"), (4, 2), ("full", "per-activation")])
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(tmp_path, rank, refresh):
    model = save_tiny(tmp_path / "model", blocks=3)
    settings = {"steps": 6, "every": 3, "active": 2, "rank": rank, "lr": 3e-3, "refresh": refresh, "table": "uniform"}
    one = owlore.train(model, ROWS, out=tmp_path / "one", batch=8, accum=1, **settings)
    four = owlore.train(model, ROWS, out=tmp_path / "four", batch=2, accum=4, **settings)
    losses = [run.history.query("split == 'train'")["loss"].tolist() for run in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = weights_of(one), weights_of(four)
    for name in a:
        # Adam divides by the root of the second moment, which magnifies rounding where a gradient is near zero.
        assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm().clamp_min(1.0), name


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("method", ["owlore", "lisa", "lisa-d", "badam", "galore", "full"])
def test_every_method_learns_with_its_defaults_and_leaves_a_loadable_model(tmp_path, method):
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", blocks=5, width=64)
    extra = {"table": "uniform"} if method == "owlore" else {}
    run = owlore.train(model, ROWS, method=method, steps=24, lr=3e-3, eval_data=0.25, out=tmp_path / "run", **extra)
    first, last = run.record["eval_loss_first"], run.record["eval_loss_last"]
    assert last < first - 0.05
    assert 0 < run.record["trainable"] <= 1
    AutoModelForCausalLM.from_pretrained(run.directory / "model")


@pytest.mark.usefixtures("pictures")
def test_the_run_directory_holds_what_the_contract_names(tmp_path):
    model = save_tiny(tmp_path / "model")
    run = owlore.train(model, ROWS, table="uniform", steps=5, active=2, eval_data=0.25, eval_every=2,
                       out=tmp_path / "run")  # fmt: skip
    names = {p.name for p in run.directory.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "model", "README.md", "plots",
                     "table.json"}  # fmt: skip
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in rows if r["split"] == "eval"] == [0, 2, 4, 5]
    assert set(rows[0]) == {"step", "epoch", "split", "loss", "lr", "grad_norm", "tokens", "tokens_per_s",
                            "mem_bytes", "state_bytes", "active_blocks"}  # fmt: skip
    record = json.loads((run.directory / "run.json").read_text())
    assert {"draws", "peak_bytes", "median_step_seconds", "tokens_per_s", "trainable"} <= set(record)
    assert (run.directory / "checkpoints/step-000005/COMPLETE").is_file()
    card = (run.directory / "README.md").read_text()
    assert "arXiv 2405.18380" in card and record["model"]["weights_sha256"][:16] in card
    assert "rule uniform" in card and " ".join(map(str, record["draws"])) in card and "seed 0" in card


def test_the_configuration_of_a_run_repeats_it(tmp_path):
    from owlore.config import TrainConfig
    from owlore.run.api import train_from_config

    model = save_tiny(tmp_path / "model")
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"instruction": r["prompt"], "output": r["completion"]} for r in ROWS]))
    first = owlore.train(model, data, table="uniform", steps=4, rank=4, active=1, every=2, out=tmp_path / "a")
    again = train_from_config(TrainConfig.build({"out": str(tmp_path / "b"), "quiet": True},
                                                file=first.directory / "config.yaml"))  # fmt: skip
    a, b = weights_of(first), weights_of(again)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("pictures")
def test_a_step_without_trained_tokens_changes_nothing_and_is_recorded(tmp_path):
    model = save_tiny(tmp_path / "model")
    rows = [{"prompt": "a", "completion": ""}] * 7 + [{"prompt": "b", "completion": "bb"}]
    run = owlore.train(model, rows, table="uniform", steps=8, batch=1, active=1, out=tmp_path / "run")
    losses = [r["loss"] for r in run.rows]
    assert len(losses) == 8 and sum(loss is not None for loss in losses) == 1


def test_the_global_random_state_is_left_alone(tmp_path):
    model = save_tiny(tmp_path / "model", attention_dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    owlore.train(model, ROWS, table="uniform", steps=3, active=1, out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_in_memory_model_is_trained_in_place(tmp_path):
    from makers import byte_tokenizer

    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = owlore.train(model, ROWS, tokenizer=byte_tokenizer(), table="uniform", steps=3, active=1, lr=1e-2,
                       out=tmp_path / "run")  # fmt: skip
    assert run.model is model
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    drawn = run.record["draws"].index(1)
    assert changed and all(n.startswith(f"model.layers.{drawn}.") for n in changed)


@pytest.mark.parametrize("placement", [{}, {"residency": "host"}, {"frozen": "nf4"}], ids=str)
def test_a_model_in_memory_whose_run_was_broken_off_is_trained_again_like_any_other(tmp_path, monkeypatch, placement):
    """It is in one piece, and nothing of the first run listens any more, neither a hook on a parameter nor a linear
    map's forward."""
    from makers import byte_tokenizer

    from owlore.training.trainer import Trainer

    model, advance = tiny_llama(blocks=4), Trainer.train_step
    settings = {"tokenizer": byte_tokenizer(), "table": "uniform", "lr": 1e-2, "every": 3}

    def broken(self):
        if self.step == 2:
            raise RuntimeError("broken off")
        return advance(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken off"):
        patch.setattr(Trainer, "train_step", broken)
        owlore.train(model, ROWS, steps=6, active=2, rank=4, out=tmp_path / "broken", **placement, **settings)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    copied = tiny_llama(blocks=4)
    copied.load_state_dict(model.state_dict())
    for method in ({"active": 2, "rank": 4}, {"active": 4, "rank": "full"}):
        for name, each in (("again", model), ("copied", copied)):
            owlore.train(each, ROWS, steps=4, out=tmp_path / f"{name}-{method['active']}", **method, **settings)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("layers", [False, True])
def test_only_one_full_gradient_is_alive_during_backward_and_none_once_there_is_a_basis(request, accum, layers):
    """Outside a step that looks for new bases with accumulation, where the sums have to wait for the last batch. Linear
    maps that the optimizer knows (all but a compiled block's) make none in between."""
    model = tiny_llama(blocks=4, width=40, hidden=56)  # no activation of 2 x 12 tokens is as large as a matrix
    freeze(model)
    parts = find_parts(model)
    matrices = [p for p in parts.parameters(range(4), ()).values() if p.ndim == 2]
    optimizer = RotatingOptimizer(parts.parameters(range(4), ()), seed=0, layers=parts.modules if layers else ())
    optimizer.switch(dict.fromkeys(parts.parameters(range(4), ()), UpdateSpec(rank=4, refresh=2)), 0)
    loss = CausalLoss(model)
    most = []
    request.addfinalizer(gc.unfreeze)
    gc.freeze()  # what the whole session holds need not be searched at every step
    for step in range(4):
        for micro in range(accum):
            ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(10 * step + micro))
            optimizer.micro_batch(step, last=micro == accum - 1)
            value = loss(ids, ids)
            gc.collect()
            with LiveTensors(matrices) as live:
                value.backward()
            most.append((live.most, len(live.alive)))
        optimizer.update(1e-3, 1.0)
    refresh = [step % 2 == 0 for step in range(4) for _ in range(accum)]
    finding = {seen for seen, due in zip(most, refresh, strict=True) if due}
    between = {seen for seen, due in zip(most, refresh, strict=True) if not due}
    assert between == {(0, 0) if layers else (1, 0)}
    if accum == 1:
        assert finding == {(1, 0)}
    else:
        assert max(finding)[0] >= len(matrices)  # the count does see what waits


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path, monkeypatch):
    from htsr.errors import NotFinite

    model = save_tiny(tmp_path / "model")
    with pytest.raises(NotFinite, match="lower --lr") as caught:
        owlore.train(model, ROWS, table="uniform", steps=30, lr=1e30, active=4, out=tmp_path / "run")
    assert caught.value.exit_code == 6
    saved = load_file(sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "weights.safetensors")
    assert saved


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_last_good_state(tmp_path):
    """A finite loss whose gradient is not, in a step that looks for a new basis: exit 6, and a resume goes on."""
    from htsr.errors import NotFinite
    from owlore.training.trainer import Trainer

    model = save_tiny(tmp_path / "model")
    settings = {"table": "uniform", "steps": 7, "active": 2, "every": 2, "rank": 8, "batch": 2}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    advance = Trainer.train_step

    def poisoned(self):
        if self.step == 4:
            state = next(
                state for state in self.rotation.optimizer.states.values() if isinstance(state, ProjectedState)
            )
            state.parameter.register_hook(lambda gradient: gradient * float("nan"))
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", poisoned)
        with pytest.raises(NotFinite, match="gradient norm nan at step 5"):
            owlore.train(model, ROWS, out=tmp_path / "run", **settings)
    again = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(tensor, weights_of(again)[name]) for name, tensor in weights_of(whole).items())


def test_a_failed_start_leaves_no_directory(tmp_path, monkeypatch):
    from htsr.errors import BadInput, HtsrError

    model = save_tiny(tmp_path / "model", blocks=4)
    other = save_tiny(tmp_path / "other", blocks=5)
    table = tmp_path / "table.json"
    from htsr.layer_table import LayerTable

    LayerTable.uniform(5, 2).save(table)
    out = tmp_path / "run"
    cases = [
        (model, ROWS, {"table": table}, BadInput),
        (model, [{"prompt": "a", "completion": ""}], {"table": "uniform"}, BadInput),
        (tmp_path / "nowhere", ROWS, {"table": "uniform"}, HtsrError),
        (model, tmp_path / "nothing.json", {"table": "uniform"}, HtsrError),
        (other / "model.safetensors", ROWS, {"table": "uniform"}, BadInput),
    ]
    for ref, data, settings, error in cases:
        with pytest.raises(error):
            owlore.train(ref, data, steps=2, out=out, **settings)
        assert not out.exists()


def test_weights_with_nan_end_with_the_contracts_error(tmp_path):
    from htsr.errors import NotFinite

    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model = save_tiny(tmp_path / "model", broken)
    with pytest.raises(NotFinite):
        owlore.train(model, ROWS, table="uniform", steps=2, out=tmp_path / "run", eval_data=0.2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eval_batch", [1, 5])
def test_held_out_loss_is_the_mean_over_all_trained_tokens(tmp_path, eval_batch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from owlore.data.batches import collate
    from owlore.data.prepare import prepare
    from owlore.training.evaluate import held_out_loss

    directory = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    data = prepare(ROWS, AutoTokenizer.from_pretrained(directory), seq_len=64).train
    ours = held_out_loss(CausalLoss(model), data, batch=eval_batch, device=torch.device("cpu"))
    total = count = 0.0
    with torch.no_grad():
        for row in range(len(data)):
            one = collate(data, [row])
            logits = model(one.input_ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, one.labels[0, 1:], ignore_index=-100, reduction="sum"))
            count += one.num_trained
    assert ours == pytest.approx(total / count, rel=1e-5)
