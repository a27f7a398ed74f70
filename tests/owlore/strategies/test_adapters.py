"""Adapter methods on the engine: how they are prepared, saved, resumed, merged and used."""

import json

import pytest
import torch
from click.testing import CliRunner
from makers import save_tiny, tiny_models

import owlore
from htsr.errors import BadInput, NotFound, UsageError
from owlore.cli import cli
from owlore.merge import merge
from owlore.strategies import STRATEGIES

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
ADAPTERS = [name for name, strategy in STRATEGIES.items() if strategy.adapts]
CPU = torch.device("cpu")


def test_smts_blocks_are_those_with_the_largest_gradients_of_the_first_batches(tmp_path):
    """The map against whole gradients of the same micro-batches, taken with plain autograd."""
    from owlore.data.prepare import prepare
    from owlore.models.loading import load
    from owlore.run.inputs import arrange
    from owlore.training.trainer import collated

    directory = save_tiny(tmp_path / "model", blocks=3, width=64)
    run = owlore.train(directory, ROWS, method="smt", steps=1, set={"warmup_batches": 3}, out=tmp_path / "run")
    config = json.loads((run.directory / "model/adapter_config.json").read_text())
    size, blocks = config["block_map"]["block_size"], config["block_map"]["blocks"]
    loaded = load(str(directory), dtype="auto", attn="sdpa", device=CPU)
    data = prepare(ROWS, loaded.tokenizer, seq_len=256).train
    names = [n for n, _ in loaded.model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    scores = {}
    for step in range(1, 4):
        batch = collated(data, arrange_of(arrange, data).step(step)[0]).on(CPU)
        loaded.model.zero_grad()
        loaded.model(**batch).loss.backward()
        for name in names:
            whole = loaded.model.get_submodule(name).weight.grad.abs().double()
            m, n = whole.shape
            means = whole.view(m // size, size, n // size, size).mean((1, 3)).tolist()
            for i, row in enumerate(means):
                for j, mean in enumerate(row):
                    scores[name, i, j] = scores.get((name, i, j), 0.0) + mean
    count = sum(len(cells) for cells in blocks.values())
    best = sorted(scores, key=scores.get, reverse=True)[:count]
    assert {(name, i, j) for name, cells in blocks.items() for i, j in cells} == set(best)
    assert run.record["steps"] == 1 and len(run.rows) == 1  # the warm-up is no step


def arrange_of(arrange, data):
    from types import SimpleNamespace

    from owlore.config import TrainConfig

    return arrange(TrainConfig.build({"steps": 1}), SimpleNamespace(train=data, seq_len=256))


def test_the_block_map_is_kept_with_the_checkpoint_and_not_made_again(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    settings = {"method": "smt", "save_every": 2, "schedule": "constant", "set": {"warmup_batches": 2}}
    run = owlore.train(model, ROWS, steps=2, out=tmp_path / "run", **settings)
    state = json.loads((run.directory / "checkpoints/step-000002/state.json").read_text())
    saved = json.loads((run.directory / "model/adapter_config.json").read_text())["block_map"]
    assert state["notes"] == {"block_map": saved}
    monkeypatch.setattr("owlore.adapters.select_blocks", None)  # to call it now is an error
    again = owlore.train(model, ROWS, steps=4, out=tmp_path / "run", resume=True, **settings)
    assert again.record["steps"] == 4


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt-neox"])
def test_other_families_train_save_and_load(tmp_path, family, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", tiny_models()[family]())
    run = owlore.train(model, ROWS, method=method, steps=2, lr=1e-2, out=tmp_path / "run",
                       **({"set": {"warmup_batches": 1}} if method == "smt" else {}))  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        own = run.model(ids).logits
        loaded = PeftModel.from_pretrained(base, run.directory / "model").eval()(ids).logits
    torch.testing.assert_close(loaded, own, rtol=1e-4, atol=1e-4)
    assert (own - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["lora", "smt", "dota"])
def test_a_16_bit_base_keeps_its_bits_and_the_merge_rounds_once(tmp_path, method):
    from safetensors.torch import load_file

    model = save_tiny(tmp_path / "model", blocks=3, width=64, dtype=torch.bfloat16)
    run = owlore.train(model, ROWS, method=method, steps=4, lr=1e-2, out=tmp_path / "run")
    merged = merge(run.directory, tmp_path / "merged", device=CPU)
    before, after = (load_file(d / "model.safetensors") for d in (model, tmp_path / "merged"))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    targets = run.model.targeted_module_names
    for name in before:
        if name.removesuffix(".weight") not in targets:
            assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert merged.max_difference <= 0.05 * merged.max_logit


def test_the_command_merges_and_says_how_far_the_logits_are_and_generate_takes_the_run(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    run = owlore.train(model, ROWS, method="lora", steps=2, lr=1e-2, out=tmp_path / "run")
    done = CliRunner().invoke(cli, ["merge", str(run.directory), "-o", str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["matrices"] == 21 and made["max_difference"] <= 1e-4 * made["max_logit"] and made["same_best"] == 1.0
    said = [CliRunner().invoke(cli, ["generate", str(place), "--prompt", "say ab: ", "--max-new-tokens", "8"]).stdout
            for place in (run.directory, run.directory / "model", tmp_path / "merged", model)]  # fmt: skip
    assert said[0] == said[1] == said[2] != said[3]


def test_what_cannot_be_merged_is_refused_by_name(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    run = owlore.train(model, ROWS, method="lora", steps=1, out=tmp_path / "run")
    with pytest.raises(BadInput, match="holds no adapter"):
        merge(model, tmp_path / "merged", device=CPU)
    with pytest.raises(NotFound):
        merge(tmp_path / "nowhere", tmp_path / "merged", device=CPU)
    with pytest.raises(UsageError, match="not empty"):
        merge(run.directory, model, device=CPU)
    with pytest.raises(BadInput, match="owlore merge"):
        owlore.train(run.directory / "model", ROWS, method="full", steps=1, out=tmp_path / "again")


@pytest.mark.parametrize("method", ADAPTERS)
def test_checkpointing_changes_nothing(tmp_path, method):
    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    losses = []
    for word in ("off", "on"):
        run = owlore.train(model, ROWS, method=method, steps=3, lr=1e-2, checkpointing=word, out=tmp_path / word)
        losses.append(run.history["loss"].tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_best_evaluation_comes_back(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3, width=64)
    run = owlore.train(model, ROWS, method="smt", steps=6, lr=0.5, eval_data=0.3, eval_every=1, keep_best=True,
                       schedule="constant", out=tmp_path / "run")  # fmt: skip
    best = run.record["eval_best"]
    assert run.record["exported_step"] == best["step"]
    from owlore.io.checkpoint import load

    saved = load(run.directory / f"checkpoints/step-{best['step']:06d}").weights
    named = dict(run.model.get_base_model().named_parameters())
    assert saved and all(torch.equal(named[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("method", ["lora", "dora", "dota", "qdota"])
def test_planned_activations_are_what_autograd_keeps(method):
    """Counted on five blocks at a length that was not probed; DoRA keeps sums as large as weights, whatever the length.

    The lowest block needs no gradient of its input, so the plan is a little high.
    """
    from makers import tiny_llama

    from owlore.blocks import freeze
    from owlore.plan.footprint import measure_footprint, saved_bytes
    from owlore.strategies import PrepareContext

    own = {key: one.default for key, one in STRATEGIES[method].method_options.items()}

    def prepared(model):
        return STRATEGIES[method].prepare(model, PrepareContext(options=own, seed=0)).trained

    model = tiny_llama(blocks=5, width=64, seed=1)
    footprint = measure_footprint(model.config, dtype=torch.float32, prepare=prepared)
    names = prepared(model)
    freeze(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for tokens in (16, 80):
        planned = 5 * (footprint.trained(tokens) + footprint.trained.fixed) + footprint.outside(tokens)
        counted = saved_bytes(model.train(), torch.zeros(1, tokens, dtype=torch.long))
        assert counted <= planned <= 1.05 * counted
