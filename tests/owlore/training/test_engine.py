"""The engine on tiny models: accumulation, backward depth, what changes, what is held, reductions."""

import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from makers import save_tiny, tiny_llama
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import owlore
from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import find_parts, freeze
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.training.loss import CausalLoss

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


def master_policy(run):
    return load_file(run.directory / "model/model.safetensors")


@pytest.mark.parametrize(("rank", "refresh"), [(4, "per-activation"), (4, 2), ("full", "per-activation")])
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(tmp_path, rank, refresh):
    model = save_tiny(tmp_path / "model", blocks=3)
    settings = {"steps": 6, "every": 3, "active": 2, "rank": rank, "lr": 3e-3, "refresh": refresh, "table": "uniform"}
    one = owlore.train(model, ROWS, out=tmp_path / "one", batch=8, accum=1, **settings)
    four = owlore.train(model, ROWS, out=tmp_path / "four", batch=2, accum=4, **settings)
    losses = [run.history.query("split == 'train'")["loss"].tolist() for run in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = master_policy(one), master_policy(four)
    for name in a:
        # Adam divides by the root of the second moment, which magnifies rounding where a gradient is near zero.
        assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm().clamp_min(1.0), name


class LiveTensors(TorchDispatchMode):
    """Walks what lives while backward runs: storages as large as one of the matrices, the weights themselves aside."""

    def __init__(self, matrices):
        super().__init__()
        self.sizes = {m.untyped_storage().nbytes() for m in matrices}
        self.own = {m.untyped_storage()._cdata for m in matrices}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if storage.nbytes() in self.sizes and key not in self.own and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.most = max(self.most, len(self.alive))
                    weakref.finalize(storage, self.alive.pop, key, None)
        return out


class Walked:
    """The blocks that backward really reaches: each marks itself when a gradient arrives at its feed-forward output."""

    def __init__(self, blocks):
        self.seen = set()
        for index, block in enumerate(blocks):
            block.mlp.register_forward_hook(self._mark(index))

    def _mark(self, index):
        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: self.seen.add(index))

        return hook


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("active", "embeddings", "walked"), [
    ((6, 7), False, {6, 7}),
    ((4, 7), False, {4, 5, 6, 7}),
    ((0,), False, set(range(8))),
    ((6, 7), True, set(range(8))),
])  # fmt: skip
def test_backward_stops_at_the_lowest_trained_block(checkpointing, active, embeddings, walked):
    model = tiny_llama(blocks=8)
    freeze(model)
    parts = find_parts(model)
    optimizer = RotatingOptimizer(parts.parameters(range(8), parts.groups), seed=0)
    groups = ("embeddings",) if embeddings else ()
    optimizer.switch(dict.fromkeys(parts.parameters(active, groups), UpdateSpec()), 0)
    recompute = ActivationCheckpointing(parts.modules, enabled=checkpointing)
    recompute.lowest = 0 if embeddings else active[0]
    counter = Walked(parts.modules)
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    CausalLoss(model)(ids, ids).backward()
    assert counter.seen == walked


@pytest.mark.parametrize("active", [(0, 5), (5,), (2, 3)])
def test_gradients_are_the_same_with_and_without_checkpointing(active):
    results = []
    for enabled in (False, True):
        model = tiny_llama(blocks=6)
        freeze(model)
        parts = find_parts(model)
        for parameter in parts.parameters(active, ()).values():
            parameter.requires_grad_(True)
        recompute = ActivationCheckpointing(parts.modules, enabled=enabled)
        recompute.lowest = active[0]
        ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        CausalLoss(model)(ids, ids).backward()
        recompute.patches.close()
        assert all("forward" not in vars(block) for block in parts.modules)
        results.append({n: p.grad for n, p in parts.parameters(active, ()).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_recomputation_keeps_one_buffer_and_no_hidden_state_beside_it():
    model = tiny_llama(blocks=8, width=32)
    freeze(model)
    parts = find_parts(model)
    for parameter in parts.parameters((2, 6), ()).values():
        parameter.requires_grad_(True)
    recompute = ActivationCheckpointing(parts.modules, enabled=True)
    recompute.lowest = 2
    ids = torch.randint(4, 60, (3, 13), generator=torch.Generator().manual_seed(0))
    loss = CausalLoss(model)
    hidden = torch.empty(3, 13, 32), torch.empty(6, 3, 13, 32)
    with LiveTensors(hidden) as watch:
        out = loss(ids, ids)
        # The input of the last norm, and the buffer of six blocks.
        assert sorted(watch.alive.values()) == [tensor.nbytes for tensor in hidden]
        out.backward()
    assert not watch.alive


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_undrawn_blocks_are_bit_identical_in_the_export_and_drawn_ones_changed(tmp_path, dtype, tied):
    model = save_tiny(tmp_path / "model", blocks=6, tied=tied, dtype=getattr(torch, dtype))
    run = owlore.train(model, ROWS, table="uniform", steps=9, every=3, active=1, rank=8, lr=1e-2, out=tmp_path / "run")
    before, after = load_file(model / "model.safetensors"), master_policy(run)
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {getattr(torch, dtype)}
    draws = run.record["draws"]
    assert sum(draws) == 3 and 0 in draws
    for name in before:
        block = int(name.split(".")[2]) if ".layers." in name else None
        drawn = block is not None and draws[block] > 0
        assert torch.equal(before[name], after[name]) != drawn, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_in_plain_transformers_and_gives_the_same_logits(tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_tiny(tmp_path / "model", dtype=getattr(torch, dtype))
    run = owlore.train(model, ROWS, table="uniform", steps=4, every=2, active=2, rank=8, lr=1e-2, out=tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "model")
    assert plain.dtype == getattr(torch, dtype)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, run.model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(run.directory / "model")
    assert tokenizer("the end").input_ids == run.tokenizer("the end").input_ids


def test_training_wider_than_the_checkpoint_exports_in_its_dtype_and_keeps_frozen_bits(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4, dtype=torch.bfloat16)
    run = owlore.train(
        model, ROWS, table="uniform", steps=3, active=1, rank=8, lr=1e-2, weights="fp32", out=tmp_path / "run"
    )
    assert run.model.dtype == torch.float32
    before, after = load_file(model / "model.safetensors"), master_policy(run)
    drawn = [i for i, n in enumerate(run.record["draws"]) if n]
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    for name in before:
        assert torch.equal(before[name], after[name]) != any(f".layers.{i}." in name for i in drawn)


def test_loading_narrower_than_the_checkpoint_loses_no_bit_of_what_was_never_trained(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    run = owlore.train(
        model, ROWS, table="uniform", steps=3, active=1, rank=8, lr=1e-2, dtype="bfloat16", out=tmp_path / "run"
    )
    assert run.model.dtype == torch.bfloat16
    before, after = load_file(model / "model.safetensors"), master_policy(run)
    drawn = [i for i, n in enumerate(run.record["draws"]) if n]
    assert {t.dtype for t in after.values()} == {torch.float32}
    for name in before:
        assert torch.equal(before[name], after[name]) != any(f".layers.{i}." in name for i in drawn)


def plain_adamw(model_dir, rows, steps, lr, parameters_of):
    """The textbook loop on transformers' own loss, with the same rows in the same order."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from owlore.data.batches import collate, step_rows
    from owlore.data.prepare import prepare

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    data = prepare(rows, AutoTokenizer.from_pretrained(model_dir), seq_len=256, seed=0).train
    parameters = parameters_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        batch = collate(data, step_rows(step + 1, batch=4, accum=1, n=len(data), seed=0)[0])
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


def test_full_fine_tuning_is_plain_adamw_on_the_models_own_loss(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3)
    run = owlore.train(model, ROWS, method="full", steps=10, lr=1e-3, batch=4, out=tmp_path / "run")
    reference, losses = plain_adamw(model, ROWS, 10, 1e-3, lambda m: list(m.parameters()))
    assert run.history.query("split == 'train'")["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    for name, parameter in reference.named_parameters():
        assert (parameter.detach() - master_policy(run)[name]).norm() <= 1e-4 * parameter.detach().norm()


def test_all_blocks_at_full_rank_with_everything_on_is_full_fine_tuning(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3)
    common = {"steps": 6, "lr": 1e-3}
    full = owlore.train(model, ROWS, method="full", out=tmp_path / "full", **common)
    all_blocks = owlore.train(
        model, ROWS, table="uniform", active=3, rank="full", every=10, always_on="embeddings,norm,head",
        out=tmp_path / "all", **common,
    )  # fmt: skip
    assert full.history["loss"].tolist() == all_blocks.history["loss"].tolist()
    a, b = master_policy(full), master_policy(all_blocks)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_uniform_table_at_full_rank_is_lisa(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=5)
    common = {"steps": 8, "every": 2, "active": 2, "always_on": "embeddings,norm,head", "lr": 1e-3}
    lisa = owlore.train(model, ROWS, method="lisa", out=tmp_path / "lisa", **common)
    uniform = owlore.train(model, ROWS, table="uniform", rank="full", out=tmp_path / "owlore", **common)
    a, b = master_policy(lisa), master_policy(uniform)
    assert lisa.record["draws"] == uniform.record["draws"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_period_without_end_is_static_freezing_of_the_rest(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    run = owlore.train(model, ROWS, table="uniform", rank="full", active=1, every=100, steps=8, lr=1e-3,
                       out=tmp_path / "run")  # fmt: skip
    block = run.record["draws"].index(1)
    _, losses = plain_adamw(model, ROWS, 8, 1e-3, lambda m: list(m.model.layers[block].parameters()))
    assert run.history.query("split == 'train'")["loss"].tolist() == pytest.approx(losses, rel=1e-5)


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
    a, b = master_policy(first), master_policy(again)
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


@pytest.mark.parametrize("home", [{}, {"residency": "host"}, {"frozen": "nf4"}], ids=str)
def test_a_model_in_memory_whose_run_was_broken_off_is_trained_again_like_any_other(tmp_path, monkeypatch, home):
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
        owlore.train(model, ROWS, steps=6, active=2, rank=4, out=tmp_path / "broken", **home, **settings)
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
        assert max(finding)[0] >= len(matrices)  # the walk does see what waits


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
            state = next(state for state in self.rotation.optimizer.states.values() if state.projected)
            state.parameter.register_hook(lambda gradient: gradient * float("nan"))
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", poisoned)
        with pytest.raises(NotFinite, match="gradient norm nan at step 5"):
            owlore.train(model, ROWS, out=tmp_path / "run", **settings)
    again = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(tensor, master_policy(again)[name]) for name, tensor in master_policy(whole).items())


def test_one_block_at_a_time_at_full_rank_is_badam(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    common = {"steps": 10, "every": 2, "active": 1, "draw": "cyclic", "lr": 1e-3, "table": "uniform"}
    badam = owlore.train(model, ROWS, method="badam", out=tmp_path / "badam", **common)
    ours = owlore.train(model, ROWS, rank="full", out=tmp_path / "owlore", **common)
    assert badam.record["draws"] == [2, 1, 1, 1]
    a, b = master_policy(badam), master_policy(ours)
    assert all(torch.equal(a[name], b[name]) for name in a)


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
