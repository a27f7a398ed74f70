"""LoRA and DoRA on the engine are PEFT's own, and what a run saves is an adapter that PEFT loads."""

import pytest
import torch
from makers import save_tiny

import owlore
from htsr.errors import UsageError

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
STEPS = 5


def trained_by_hand(directory, config, run):
    """PEFT and torch.optim.AdamW on the batches of `run`, from the adapter's own first weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from owlore.config import TrainConfig
    from owlore.data.prepare import prepare
    from owlore.kernels.seeds import seed_for
    from owlore.run.inputs import arrange
    from owlore.training.schedule import learning_rate
    from owlore.training.trainer import collated

    settings = TrainConfig.build({"steps": STEPS, "batch": 4})
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(0, "adapter"))
        model = get_peft_model(model, config)
    data = prepare(ROWS, AutoTokenizer.from_pretrained(directory), seq_len=256)
    arrangement = arrange(settings, data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=1e-2, steps=STEPS, schedule="linear", warmup=0)
        batch = collated(data.train, arrangement.step(step + 1)[0]).on(torch.device("cpu"))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_is_pefts_own_training_by_hand(tmp_path, method):
    from peft import LoraConfig

    model = save_tiny(tmp_path / "model", width=64)
    run = owlore.train(model, ROWS, method=method, steps=STEPS, lr=1e-2, set={"r": 4}, out=tmp_path / "run")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear",
                        use_dora=method == "dora")  # fmt: skip
    theirs, losses = trained_by_hand(model, config, run)
    assert run.history["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.model(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "own"), [("lora", {}), ("dora", {}), ("lora", {"init": "pissa", "r": 4})])
def test_the_adapter_directory_gives_the_same_logits_in_peft(tmp_path, method, own):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "model", width=64)
    run = owlore.train(model, ROWS, method=method, steps=3, lr=1e-2, set=own, out=tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(model)
    again = PeftModel.from_pretrained(base, run.directory / "model").eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits)
        torch.testing.assert_close(again(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_pissa_begins_with_the_base_models_output_and_the_leading_singular_part(tmp_path):
    from transformers import AutoModelForCausalLM

    from owlore.strategies import STRATEGIES, PrepareContext
    from owlore.strategies.lora import OPTIONS

    directory = save_tiny(tmp_path / "model", width=64)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(4, 20)[None]
    before = model(ids).logits
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    own = {key: one.default for key, one in OPTIONS.items()} | {"init": "pissa", "r": 4, "alpha": 4}
    STRATEGIES["lora"].prepare(model, PrepareContext(options=own, seed=0, batches=lambda count: iter(())))
    layer = model.model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    U, S, Vh = torch.linalg.svd(weight)
    torch.testing.assert_close(product, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_an_unknown_or_unreadable_own_option_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean dropout"):
        owlore.train("demo", ROWS, method="lora", set={"dropuot": 0.1}, out=tmp_path / "run")
    with pytest.raises(UsageError, match="--set r got 'many', expected a whole number"):
        owlore.train("demo", ROWS, method="lora", set={"r": "many"}, out=tmp_path / "run")
    with pytest.raises(UsageError, match="always-on is not read by the method lora"):
        owlore.train("demo", ROWS, method="lora", always_on=["head"], out=tmp_path / "run")
    with pytest.raises(UsageError, match="does not fit"):
        owlore.train("demo", ROWS, method="lora", set={"target_modules": "no_proj"}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_papers_preset_is_used_and_written_down(tmp_path):
    model = save_tiny(tmp_path / "model", width=64)
    run = owlore.train(model, ROWS, method="lora", steps=2, preset="paper", warmup=0, set={"r": 8},
                       out=tmp_path / "run")  # fmt: skip
    config = run.record["config"]
    assert config["set"] == {"r": 8, "alpha": 64.0, "dropout": 0.0, "init": "default",
                             "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}  # fmt: skip
    assert config["batch"] == 16 and config["seq_len"] == 256


def test_a_pissa_run_goes_on_bit_for_bit_and_its_adapter_is_for_the_unchanged_base(tmp_path):
    from safetensors.torch import load_file

    model = save_tiny(tmp_path / "model", width=64)
    settings = {"method": "lora", "set": {"init": "pissa", "r": 4}, "steps": 4, "lr": 1e-2, "save_every": 2, "keep": 5}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    again = owlore.train(model, ROWS, out=tmp_path / "again",
                         resume=str(whole.directory / "checkpoints/step-000002"), **settings)  # fmt: skip
    a, b = (load_file(run.directory / "model/adapter_model.safetensors") for run in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {t.shape[0] for name, t in a.items() if "lora_A" in name} == {8}  # twice r: what it took is given back


def test_htsr_scans_what_a_lora_run_saves(tmp_path):
    import htsr

    model = save_tiny(tmp_path / "model", width=64)
    run = owlore.train(model, ROWS, method="lora", steps=2, lr=1e-2, out=tmp_path / "run")
    frame = htsr.scan(run.directory / "model", calibration=None).frame
    assert len(frame) == 28 and set(frame["status"]) <= {"ok", "failed", "skipped"}
    layer = run.model.get_base_model().model.layers[1].mlp.down_proj
    row = frame[frame["tensor"] == "model.layers.1.mlp.down_proj.weight"].iloc[0]
    change = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert row["log10_spectral_norm"] == pytest.approx(2 * float(torch.linalg.matrix_norm(change, 2).log10()), abs=1e-3)
