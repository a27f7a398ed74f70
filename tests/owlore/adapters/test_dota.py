"""DoTA: the base's own output at the start to the last bit, and a dense weight that nobody keeps."""

import copy

import pytest
import torch
from makers import generator, tiny_llama, tiny_models
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from owlore.adapters import DotaConfig
from owlore.adapters.dota_layer import DotaLayer
from owlore.kernels.mpo import make_shape, rebuild
from owlore.optim.update_spec import MasterPolicy, UpdateSpec, planned_state_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 64, (2, 12), generator=generator(0))


def llama(dtype=torch.float32, **settings):
    return tiny_llama(blocks=3, width=32, hidden=53, dtype=dtype, **settings).eval()  # 53 is prime: padded


def adapted(model=None, **config):
    return get_peft_model(model or llama(), DotaConfig(**{"target_modules": TARGETS, "bond": 4} | config))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DotaLayer)}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def train(model, parameters, steps=4, lr=1e-2):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = loss_of(model, torch.randint(3, 64, (2, 12), generator=generator(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, optimizer


def base_is_whole(model, start):
    weights = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "dota_" not in n}
    return all(torch.equal(weights[name], value) for name, value in start.items())


FAMILIES = {"llama-tied": ["q_proj", "down_proj"], "qwen2": ["q_proj", "k_proj"], "gpt2": ["c_attn", "c_fc"],
            "phi": ["q_proj", "fc1"]}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("config", [{}, {"init": "random"}, {"num_cores": 1}, {"num_cores": 2, "gauge": "left"}])
def test_the_first_logits_are_the_bases_bit_for_bit_and_so_are_the_disabled_ones(name, dtype, config):
    base = tiny_models()[name]().to(dtype)
    start = copy.deepcopy(base.state_dict())
    expected = base(IDS).logits
    model = adapted(base, target_modules=FAMILIES[name], **config)
    assert torch.equal(model(IDS).logits, expected)
    train(model.eval(), trained(model).values(), steps=2)
    assert not torch.equal(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    inner = {n.replace(".base_layer", ""): v for n, v in model.base_model.model.state_dict().items()}
    assert all(torch.equal(inner[key], value) for key, value in start.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_adapter_reloads_and_merges_to_the_same_logits(tmp_path, name):
    model = adapted(tiny_models()[name](), target_modules=FAMILIES[name])
    train(model.eval(), trained(model).values())
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_models()[name](), tmp_path, adapter_name="renamed")
    assert torch.equal(again(IDS).logits, expected)
    lean = PeftModel.from_pretrained(tiny_models()[name](), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(lean(IDS).logits, expected)
    assert torch.equal(again.merge_and_unload()(IDS).logits, expected)


def test_merging_and_unmerging_changes_no_bit():
    start = llama(torch.bfloat16).state_dict()
    model = adapted(llama(torch.bfloat16))
    train(model, trained(model).values())
    expected = model(IDS).logits
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, expected) and base_is_whole(model.base_model.model, start)
    assert base_is_whole(copy.deepcopy(model).unload(), start)


def test_several_adapters_switch_add_up_and_are_deleted():
    model = adapted()
    train(model, trained(model).values())
    first = model(IDS).logits
    model.add_adapter("other", DotaConfig(target_modules=TARGETS, bond=2, num_cores=2))
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("other")
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    train(model, trained(model).values())
    model.base_model.set_adapter(["default", "other"])
    both = llama()
    for name, layer in layers(model).items():
        weight = both.get_submodule(name.removeprefix("base_model.model.")).weight.data
        weight += layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert torch.allclose(model(IDS).logits, both(IDS).logits, atol=1e-5)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)


def test_one_core_is_full_fine_tuning_of_the_targets():
    base = llama(torch.float64)
    full = copy.deepcopy(base)
    model = adapted(copy.deepcopy(base), num_cores=1)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(any(target in name for target in TARGETS))
    ours, _ = train(model, trained(model).values())
    truth, _ = train(full, [p for p in full.parameters() if p.requires_grad])
    assert ours == pytest.approx(truth, rel=1e-9)


def test_bytes_of_the_file_and_of_the_optimizer_are_the_formulas(tmp_path):
    model = adapted(llama(torch.bfloat16))
    count = sum(make_shape(layer.out_features, layer.in_features, 3, 4).parameters for layer in layers(model).values())
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert sum(p.numel() for p in trained(model).values()) == count
    _, optimizer = train(model, trained(model).values())
    moments = [t for s in optimizer.state.values() for key, t in s.items() if key != "step"]
    assert sum(t.numel() * t.element_size() for t in moments) == 8 * count
    states = [
        planned_state_bytes(tuple(p.shape), p.dtype, UpdateSpec(rank=2), MasterPolicy.MASTER)
        for p in trained(model).values()
    ]
    assert sum(s.total for s in states) == 8 * count  # a core is never projected, and needs no master
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in saved.values()) == 8 * count  # the cores and the first ones


def test_the_density_chooses_the_largest_bond_within_it(tmp_path):
    from owlore.adapters.targets import count_2d

    limit = 0.1 * count_2d(llama())
    model = adapted(density=0.1)
    bond = model.peft_config["default"].bond
    assert sum(p.numel() for p in trained(model).values()) <= limit
    assert sum(p.numel() for p in trained(adapted(bond=bond + 1)).values()) > limit
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, model(IDS).logits)


def test_no_dense_weight_is_alive_between_forward_and_backward():
    """Counted through the saved-tensor hooks of a whole layer stack: inputs, cores and the base's own weights."""
    model = get_peft_model(nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 48)),
                           DotaConfig(target_modules=["0", "2"], bond=3))  # fmt: skip
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(torch.randn(6, 48, generator=generator(0)))
    fresh = [tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in held]
    assert sorted(set(fresh)) == [(6, 40), (6, 48)]
    y.sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_checkpointing_gives_the_same_gradients(quantise):
    model = adapted(quantise=quantise)
    train(model, trained(model).values(), steps=1)
    loss_of(model).backward()
    expected = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(trained(model).values(), expected, strict=True))


def test_an_explicit_residual_and_its_operator_are_the_weight():
    start = llama(torch.float64)
    model = adapted(llama(torch.float64), residual="explicit")
    for name, layer in layers(model).items():
        weight = start.get_submodule(name.removeprefix("base_model.model.")).weight
        mpo = layer.dota_mpo["default"]
        product = rebuild(mpo.start, mpo.shape)
        assert float((layer.base_layer.weight + product - weight).detach().abs().max()) < 1e-15
        assert float(product.norm()) > 0.1 * float(weight.detach().norm())
    assert torch.allclose(model(IDS).logits, start(IDS).logits, rtol=0, atol=1e-12)
    first = model(IDS).logits
    train(model, trained(model).values())
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, first)
    assert torch.allclose(model.unload()(IDS).logits, start(IDS).logits, rtol=0, atol=1e-12)


def test_the_adapter_that_holds_the_residual_stays():
    model = adapted(residual="explicit")
    model.add_adapter("other", DotaConfig(target_modules=TARGETS, bond=2))
    model.set_adapter("other")
    assert torch.allclose(model(IDS).logits, llama()(IDS).logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="residual of adapter default"):
        model.delete_adapter("default")


def planted(seed):
    """(base weights, targets, inputs): the task moves W0 along its own leading operator, as fine-tuning is said to."""
    rows, cols, bond = 32, 48, 4
    shape = make_shape(rows, cols, 3, bond)
    draw = generator(seed)
    cores = [torch.randn(core, generator=draw, dtype=torch.float64) for core in shape.cores]
    leading = rebuild(cores, shape)
    noise = torch.randn(rows, cols, generator=draw, dtype=torch.float64) * 0.3
    base = leading / leading.norm() * 20 + noise
    moved = [core + 0.3 * core.std() * torch.randn(core.shape, generator=draw, dtype=torch.float64) for core in cores]
    target = base + (rebuild(moved, shape) - leading) / leading.norm() * 20
    return base, target, torch.randn(64, cols, generator=draw, dtype=torch.float64)


def fitted(base, target, x, **config):
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False, dtype=torch.float64)
    linear.weight.data.copy_(base)
    model = get_peft_model(nn.Sequential(linear), DotaConfig(target_modules=["0"], bond=4, **config))
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    for _ in range(60):
        loss = (model(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_cores_of_the_weight_learn_a_planted_task_faster_than_random_ones():
    pairs = []
    for seed in range(5):
        case = planted(seed)
        pairs.append((fitted(*case), fitted(*case, init="random", seed=seed)))
    assert all(mpo < random for mpo, random in pairs), pairs


def test_bad_configurations_are_refused_by_name():
    with pytest.raises(ValueError, match="init='mop'"):
        DotaConfig(init="mop")
    with pytest.raises(ValueError, match="num_cores=0"):
        DotaConfig(num_cores=0)
    with pytest.raises(ValueError, match="alternations need"):
        DotaConfig(alternations=2)
    with pytest.raises(ValueError, match="density"):
        DotaConfig(density=2.0)
    with pytest.raises(TypeError, match="expected a linear layer"):
        adapted(target_modules=["embed_tokens"])
