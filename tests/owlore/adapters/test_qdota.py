"""QDoTA: the base in four bits, to the byte; what the cores take off it is not lost to the codes."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from makers import generator, tiny_llama, tiny_models
from peft import PeftModel, get_peft_model
from torch import nn

from owlore.adapters import DotaConfig
from owlore.adapters.dota_layer import DotaLayer, first_cores
from owlore.adapters.nf4_linear import Nf4Linear
from owlore.kernels import nf4
from owlore.kernels.mpo import make_shape, random_cores, rebuild

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 64, (2, 12), generator=generator(0))


def llama(dtype=torch.float32, **settings):
    return tiny_llama(blocks=3, width=32, hidden=53, dtype=dtype, **settings).eval()


def adapted(model=None, **config):
    settings = {"target_modules": TARGETS, "bond": 4, "residual": "explicit", "quantise": "nf4"} | config
    return get_peft_model(model or llama(), DotaConfig(**settings))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DotaLayer)}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, steps=4):
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_the_quantised_residual_and_takes_the_planned_bytes(dtype):
    start, model = llama(dtype), adapted(llama(dtype))
    for name, layer in layers(model).items():
        weight = start.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        base, mpo = layer.base_layer, layer.dota_mpo["default"]
        residual = (weight.double() - rebuild([c.double() for c in mpo.start], mpo.shape)).to(dtype)
        expected = nf4.dequantise(nf4.quantise(residual), dtype)
        assert isinstance(base, Nf4Linear) and torch.equal(base.dense(), expected)
        held = sum(t.numel() * t.element_size() for t in base.buffers())
        assert held == nf4.planned_bytes(weight.numel()) and not list(base.parameters())
        approximate = (expected.float() + rebuild(mpo.start, mpo.shape)).to(dtype)
        assert torch.equal(layer.effective(["default"]), approximate)


def test_no_original_weight_survives_the_change_of_base():
    original = llama()
    targets = [m for name, m in original.named_modules() if name.endswith(tuple(TARGETS))]
    watched = [weakref.ref(module.weight) for module in targets]
    model = adapted(original)
    gc.collect()
    assert len(watched) == len(layers(model)) == 12 and not any(ref() is not None for ref in watched)
    assert all(module.weight.numel() == 0 for module in targets)


@pytest.mark.parametrize("config", [{}, {"alternations": 3}, {"residual": "implicit"}, {"init": "random"}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_adapter_trains_reloads_and_merges_to_what_it_computed(tmp_path, name, config):
    targets = TARGETS if name == "llama" else ["c_attn", "c_fc"]
    make = llama if name == "llama" else tiny_models()["gpt2"]
    model = adapted(make(), target_modules=targets, **config)
    first = model(IDS).logits
    losses = train(model)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, first)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert all(isinstance(layer.base_layer, Nf4Linear) for layer in layers(again).values())
    assert torch.equal(again(IDS).logits, expected)
    merged = again.merge_and_unload()
    assert {type(m) for m in merged.modules()} == {type(m) for m in make().modules()}
    assert torch.equal(merged(IDS).logits, expected)
    assert set(merged.state_dict()) == set(make().state_dict())


def test_the_same_adapter_merges_in_full_precision_from_the_unquantised_base(tmp_path):
    from peft import PeftConfig

    model = adapted()
    train(model)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.quantise = None
    exact = PeftModel.from_pretrained(llama(), tmp_path, config=config).merge_and_unload()
    start = llama()
    for name, layer in layers(model).items():
        name = name.removeprefix("base_model.model.")
        truth = start.get_submodule(name).weight + layer.get_delta_weight("default")
        assert torch.allclose(exact.get_submodule(name).weight, truth, rtol=0, atol=1e-6)


def test_quantising_the_residual_loses_less_than_quantising_a_weight_with_a_strong_operator():
    shape = make_shape(64, 96, 3, 4)
    operator = rebuild(random_cores(shape, 1.0, generator(0)), shape)
    weight = operator + 0.003 * torch.randn(64, 96, generator=generator(1), dtype=torch.float64)
    config = DotaConfig(bond=4, residual="explicit", quantise="nf4")
    direct = float((nf4.dequantise(nf4.quantise(weight)) - weight).norm())
    product = rebuild(first_cores(weight, shape, config, "w"), shape)
    through = float((nf4.dequantise(nf4.quantise(weight - product)) + product - weight).norm())
    assert through < 0.5 * direct


def test_alternation_never_makes_the_error_larger():
    weight = torch.randn(64, 96, generator=generator(1)) * 0.02
    weight[:, ::7] *= 8  # outlier columns, as real weights have them
    shape = make_shape(64, 96, 3, 8)
    errors = []
    for turns in range(5):
        config = DotaConfig(bond=8, residual="explicit", quantise="nf4", alternations=turns)
        product = rebuild([c.float().double() for c in first_cores(weight, shape, config, "w")], shape)
        residual = (weight.double() - product).float()
        errors.append(float((nf4.dequantise(nf4.quantise(residual)).double() + product - weight).norm()))
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_codes_read_by_bitsandbytes_are_the_same_weights():
    pytest.importorskip("bitsandbytes")
    quantised = nf4.quantise(nn.Linear(96, 40, bias=False).weight)  # blocks of 64 that go on in the next row
    with torch.compiler.set_stance("force_eager"):
        for dtype in (torch.float32, torch.bfloat16):
            theirs = nf4.dequantise_by_bitsandbytes(quantised, dtype)
            assert torch.equal(theirs, nf4.dequantise(quantised, dtype))


def test_a_model_that_bitsandbytes_quantised_gets_an_implicit_residual_only():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    quantised = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    quantised.weight = bnb.nn.Params4bit(model[0].weight.detach().clone(), requires_grad=False, quant_type="nf4")
    with torch.compiler.set_stance("force_eager"):
        model[0] = quantised.to("cpu")
        x = torch.randn(5, 64, generator=generator(0))
        expected = model(x)
        with pytest.raises(ValueError, match="quantised"):
            get_peft_model(copy.deepcopy(model), DotaConfig(target_modules=["0"], residual="explicit"))
        adapter = get_peft_model(model, DotaConfig(target_modules=["0"], bond=4))
        assert torch.equal(adapter(x), expected)
        optimizer = torch.optim.Adam(trained(adapter), lr=1e-2)
        for _ in range(3):
            loss = adapter(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert bool(adapter(x).square().mean() < expected.square().mean())
        with adapter.disable_adapter():
            assert torch.equal(adapter(x), expected)


def test_a_change_of_dtype_leaves_the_codes_what_they_were():
    layer = Nf4Linear(torch.randn(40, 33, generator=generator(0)), nn.Linear(33, 40))
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer = layer.to(torch.bfloat16)
    assert all(torch.equal(t, before[name]) for name, t in layer.named_buffers())
    assert layer.dense().dtype == torch.bfloat16 and layer(torch.ones(2, 33, dtype=torch.bfloat16)).shape == (2, 40)
