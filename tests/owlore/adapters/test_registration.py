"""Adapters beyond this process: importing the package is all that plain PEFT needs, and nothing without it changes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_bytes import planned
from makers import generator, save_tiny, tiny_llama
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from owlore.adapters import DotaConfig, SmtConfig
from owlore.adapters.registration import register
from owlore.adapters.smt_model import SmtModel

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

IDS = torch.randint(3, 64, (2, 12), generator=generator(0))
CONFIGS = {
    "smt": lambda: SmtConfig(target_modules=["q_proj", "v_proj"], density=0.05),
    "dota": lambda: DotaConfig(target_modules=["q_proj", "v_proj"], bond=4),
    "qdota": lambda: DotaConfig(target_modules=["q_proj", "v_proj"], bond=4, residual="explicit", quantise="nf4"),
}
ROOT = Path(__file__).parents[3]
LOAD = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import owlore, owlore.config, owlore.cli
assert "owlore.adapters" not in sys.modules and "peft" not in sys.modules
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
before = set(known)
import owlore.adapters
print(*sorted(str(name) for name in set(known) - before))
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
found = torch.load(f"{folder}/expected.pt")
for name, expected in found["logits"].items():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/{name}")
    assert torch.equal(model(found["ids"]).logits, expected), name
    assert torch.equal(model.merge_and_unload()(found["ids"]).logits, expected), name
"""


def test_another_process_that_imports_the_package_loads_the_adapters_to_the_same_logits(tmp_path):
    save_tiny(tmp_path / "base", tiny_llama(blocks=2))
    logits = {}
    for name, config in CONFIGS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        logits[name] = model.eval()(IDS).logits.detach()
        model.save_pretrained(tmp_path / name)
    torch.save({"ids": IDS, "logits": logits}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "DOTA SMT\n"  # and before the import neither they nor PEFT were there


def test_a_method_of_that_name_in_peft_itself_is_left_alone(monkeypatch):
    theirs = object()
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "SMT", theirs)
    register("SMT", SmtConfig, SmtModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SMT"] is theirs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_counts_and_bytes_are_the_counted_ones(tmp_path, name, dtype):
    with torch.device("meta"):
        shapes = tiny_llama(dtype=dtype)
    plan = planned(shapes, CONFIGS[name]())
    model = get_peft_model(tiny_llama(dtype=dtype), CONFIGS[name]())
    model(input_ids=IDS, labels=IDS).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert plan.trainable == sum(p.numel() for p in trainable)
    prefix = f"{CONFIGS[name]().peft_type.lower()}_"
    held = {n: t for n, t in model.named_buffers() if prefix in n and not n.endswith("index")}
    assert plan.frozen_bytes == sum(t.numel() * t.element_size() for t in held.values())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").values()
    assert plan.file_bytes == sum(t.numel() * t.element_size() for t in saved)
    bases = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    weights = [t for b in bases for t in (*b.parameters(), *b.buffers())]
    assert plan.base_bytes == sum(t.numel() * t.element_size() for t in weights)


def steps(model, optimizer, batches):
    losses = []
    for seed in batches:
        ids = torch.randint(3, 64, (2, 12), generator=generator(seed))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_on_bit_for_bit_from_a_saved_adapter_and_optimizer(tmp_path, name):
    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = get_peft_model(tiny_llama().eval(), CONFIGS[name]())
    optimizer = adamw(model)
    steps(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = steps(model, optimizer, range(3, 6))
    again = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path, is_trainable=True)
    optimizer = adamw(again)
    optimizer.load_state_dict(state)
    assert steps(again, optimizer, range(3, 6)) == expected


@pytest.mark.parametrize("make", [SmtConfig, DotaConfig])
def test_defaults_work_on_five_narrow_blocks_and_train_every_target(make):
    model = get_peft_model(tiny_llama(blocks=5, width=64, hidden=96), make(target_modules=["q_proj", "up_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[4] for name in trainable} == {"0", "1", "2", "3", "4"}
    assert sum("q_proj" in n for n in trainable) == sum("up_proj" in n for n in trainable) >= 5
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trainable.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_biases_that_somebody_unfreezes_get_their_gradient(name):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
    config = CONFIGS[name]()
    config.target_modules, config.density = {"0", "1"}, 0.3 if name == "smt" else None
    model = get_peft_model(model, config)
    x = torch.randn(4, 32, generator=generator(0))
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    model(x).sum().backward()
    assert torch.allclose(biases[1].grad, torch.full((16,), 4.0)) and biases[0].grad is not None


def test_default_targets_are_pefts_own():
    model = get_peft_model(tiny_llama(blocks=2), SmtConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
