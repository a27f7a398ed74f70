"""SMT: masked full fine-tuning exactly, in a weight that can always be given back."""

import copy

import pytest
import torch
from makers import generator, tiny_llama, tiny_models
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from owlore.adapters import SmtConfig, refresh, smt_layer
from owlore.adapters.nf4_linear import Nf4Linear
from owlore.adapters.smt_layer import SmtLayer
from owlore.kernels.adamw import AdamW
from owlore.kernels.block_sparse import make_layout, read_blocks
from owlore.optim.parameter_state import new_state
from owlore.optim.update_spec import MasterPolicy, UpdateSpec, planned_state_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 64, (2, 12), generator=generator(0))


def llama(dtype=torch.float32, **settings):
    return tiny_llama(blocks=3, width=40, hidden=52, dtype=dtype, **settings).eval()  # 8 divides neither side of down


def adapted(model=None, **config):
    config = {"target_modules": TARGETS, "density": 0.05, "block_size": 8} | config
    return get_peft_model(model or llama(), SmtConfig(**config))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SmtLayer)}


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


def fill(model, scale=0.1):
    """Random deltas in every adapter."""
    for k, delta in enumerate(trained(model).values()):
        delta.data.normal_(generator=generator(k)).mul_(scale)
    refresh(model)


def masks(model):
    """Base parameter name -> which entries are trained."""
    found = {}
    for name, layer in layers(model).items():
        dense = layer.get_delta_weight("default") * 0
        layout = layer.smt_blocks["default"].layout()
        smt_layer.write_blocks(dense, layout, torch.ones(layout.size, dtype=dense.dtype))
        found[name.removeprefix("base_model.model.") + ".weight"] = dense.bool()
    return found


@pytest.mark.parametrize("mode", ["inplace", "bypass"])
def test_training_is_masked_full_fine_tuning_and_leaves_every_other_entry_as_it_was(mode):
    base = llama(torch.float64)
    full = copy.deepcopy(base)
    model = adapted(copy.deepcopy(base), mode=mode)
    mask = masks(model)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name in mask)
        if name in mask:
            parameter.register_hook(lambda g, m=mask[name]: g * m)
    ours, _ = train(model, trained(model).values())
    truth, _ = train(full, [p for p in full.parameters() if p.requires_grad])
    assert ours == pytest.approx(truth, rel=1e-9)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, start in base.named_parameters():
        where = mask.get(name, torch.zeros_like(start, dtype=torch.bool))
        assert torch.equal(merged[name][~where], start[~where])
        assert torch.allclose(merged[name], dict(full.named_parameters())[name], rtol=0, atol=1e-10)
        assert not where.any() or not torch.equal(merged[name][where], start[where])


def test_the_adapted_forward_is_the_dense_forward_bit_for_bit():
    model = adapted()
    fill(model)
    ours = loss_of(model)  # through the autograd function
    ours.backward()
    with torch.no_grad():
        plain = model(IDS).logits
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(IDS).logits, plain) and torch.equal(loss_of(merged), ours)


def test_disable_unmerge_unload_and_deletion_give_every_bit_of_the_base_back():
    start = llama(torch.bfloat16).state_dict()

    def base_is_whole(model):
        weights = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "smt_" not in n}
        return all(torch.equal(weights[name], value) for name, value in start.items())

    model = adapted(llama(torch.bfloat16))
    inner = model.base_model.model
    fill(model)
    expected = model(IDS).logits
    assert not base_is_whole(inner)
    with model.disable_adapter():
        assert base_is_whole(inner) and torch.equal(model(IDS).logits, llama(torch.bfloat16)(IDS).logits)
    assert torch.equal(model(IDS).logits, expected)
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, expected)
    model.unmerge_adapter()
    assert base_is_whole(inner)
    assert torch.equal(model(IDS).logits, expected)
    clone = copy.deepcopy(model)
    model.add_adapter("other", SmtConfig(target_modules=TARGETS, block_size=8, density=0.02))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert base_is_whole(inner)
    assert base_is_whole(clone.unload())


def test_deltas_are_fp32_and_gather_what_a_16_bit_weight_would_lose():
    model = adapted(llama(torch.bfloat16))
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    assert all(p.dtype == torch.float32 for p in before.values())
    train(model, trained(model).values(), steps=3, lr=1e-6)
    assert all(float((p.detach() - before[name]).abs().max()) > 0 for name, p in trained(model).items())


def test_bytes_of_the_file_and_of_the_optimizer_are_the_formulas(tmp_path):
    model = adapted()
    blocks = model.peft_config["default"].block_map
    entries = sum(
        make_layout((layer.out_features, layer.in_features), 8, blocks["blocks"][name[17:]]).size
        for name, layer in layers(model).items()
    )
    cells = sum(len(v) for v in blocks["blocks"].values())
    assert sum(p.numel() for p in trained(model).values()) == entries
    _, optimizer = train(model, trained(model).values())
    moments = [t for s in optimizer.state.values() for key, t in s.items() if key != "step"]
    assert sum(t.numel() * t.element_size() for t in moments) == 8 * entries
    states = [
        planned_state_bytes(tuple(p.shape), p.dtype, UpdateSpec(rank=4), MasterPolicy.MASTER)
        for p in trained(model).values()
    ]
    assert sum(s.total for s in states) == 8 * entries  # a delta is never projected, and needs no master
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in saved.values()) == 4 * entries + 8 * cells
    assert {name.rsplit(".", 1)[1] for name in saved} == {"delta", "index"}


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "phi"])  # GQA, biases, Conv1D
@pytest.mark.parametrize("mode", ["inplace", "bypass"])
def test_a_saved_adapter_reloads_to_the_same_logits_in_every_family(tmp_path, name, mode):
    base = tiny_models()[name]()
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "k_proj"]
    expected_start = base(IDS).logits
    model = adapted(base, target_modules=targets, block_size=16, mode=mode)
    assert torch.equal(model(IDS).logits, expected_start)
    train(model, trained(model).values())
    expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_models()[name](), tmp_path, adapter_name="renamed")
    assert torch.equal(again(IDS).logits, expected)
    lean = PeftModel.from_pretrained(tiny_models()[name](), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(lean(IDS).logits, expected)
    tolerance = 0 if mode == "inplace" else 1e-4
    assert torch.allclose(again.merge_and_unload()(IDS).logits, expected, rtol=0, atol=tolerance)


def test_a_head_tied_to_the_embeddings_leaves_the_embeddings_alone():
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(llama(tied=True), target_modules=["lm_head"], density=0.2)
    fill(model)
    assert not layers(model)["base_model.model.lm_head"].in_place
    assert torch.equal(model.get_input_embeddings().weight, llama(tied=True).get_input_embeddings().weight)
    train(model, trained(model).values())


def test_several_adapters_switch_and_add_up():
    model = adapted(block_map=None)
    targets = {"target_modules": TARGETS, "block_size": 8, "selection": "random", "density": 0.05}
    model.add_adapter("other", SmtConfig(**targets))
    pieces = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        fill(model)
        pieces[name] = model(IDS).logits
        assert {n.split(".")[-2] for n in trained(model)} == {name}
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, pieces["default"])
    model.base_model.set_adapter(["default", "other"])
    both = llama()
    for name, layer in layers(model).items():
        weight = both.get_submodule(name.removeprefix("base_model.model.")).weight.data
        for adapter in layer.smt_blocks:
            weight += layer.get_delta_weight(adapter)
    assert torch.allclose(model(IDS).logits, both(IDS).logits, rtol=0, atol=1e-5)
    loss_of(model).backward()
    gradients = {n.split(".")[-2]: p.grad for n, p in trained(model).items()}
    assert set(gradients) == {"default", "other"} and all(g is not None for g in gradients.values())


def test_blocks_are_rewritten_when_a_delta_changed_and_only_then(monkeypatch):
    writes = []
    original = smt_layer.write_blocks
    monkeypatch.setattr(smt_layer, "write_blocks", lambda *a: writes.append(1) or original(*a))
    model = adapted()
    first = model(IDS).logits.detach()
    with torch.no_grad():
        model(IDS)
        writes.clear()
        model(IDS)
        assert not writes
        name, delta = next(iter(trained(model).items()))
        delta.add_(0.1)  # the version counter tells
        assert not torch.equal(model(IDS).logits, first) and len(writes) == 1
    del name


@pytest.mark.parametrize("weights", list(MasterPolicy))
def test_an_optimizer_that_writes_behind_autograds_back_is_seen_by_the_next_forward(weights):
    model = adapted()
    states = [new_state(n, p, UpdateSpec(adam=AdamW()), policy=weights, seed=0) for n, p in trained(model).items()]
    losses = []
    for step in range(5):
        loss = loss_of(model)
        loss.backward()
        versions = [state.parameter._version for state in states]
        for state in states:
            state.accumulate(state.parameter.grad, last=True, step=step)
            state.parameter.grad = None
            state.update(1e-2, 1.0, step)
        assert versions == [state.parameter._version for state in states], "then nothing is left to test here"
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    last = model(IDS).logits
    refresh(model)
    assert torch.equal(model(IDS).logits, last)


@pytest.mark.parametrize("training", [True, False])
def test_deltas_restored_behind_autograds_back_are_seen_by_the_first_forward(training):
    model, again = adapted(), adapted()
    fill(model)
    for theirs, mine in zip(trained(model).values(), trained(again).values(), strict=True):
        mine.data.copy_(theirs)
    with torch.set_grad_enabled(training):
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_refresh_writes_a_delta_that_was_changed_by_hand():
    model = adapted()
    with torch.no_grad():
        model(IDS)
        before = model(IDS).logits
        for delta in trained(model).values():
            delta.data += 0.1
        refresh(model)
        assert not torch.equal(model(IDS).logits, before)


def test_a_reference_forward_between_forward_and_backward_changes_no_gradient():
    model = adapted()
    fill(model)
    loss_of(model).backward()
    expected = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    loss = loss_of(model)
    with model.disable_adapter(), torch.no_grad():
        model(IDS)
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(trained(model).values(), expected, strict=True))


def test_an_update_between_forward_and_backward_is_refused():
    model = adapted()
    loss = loss_of(model)
    with torch.no_grad():
        for delta in trained(model).values():
            delta += 1.0
        model(IDS)
    with pytest.raises(RuntimeError, match="rewritten after the forward"):
        loss.backward()


def test_backward_keeps_the_input_and_nothing_of_the_weights_size():
    layer = get_peft_model(nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 32)),
                           SmtConfig(target_modules=["0", "2"], block_size=8, density=0.3))  # fmt: skip
    held = {p.data_ptr() for p in layer.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(6, 48, generator=generator(0)))
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in held]
    assert {tuple(t.shape) for t in fresh} == {(6, 48), (6, 40)}  # inputs of both maps; ReLU's result is the second's
    assert {t.untyped_storage().data_ptr() for t in saved} & held  # the second map's weight, not a copy of it


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted()
    fill(model)
    loss_of(model).backward()
    expected = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss_of(model).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(trained(model).values(), expected, strict=True))


def test_autocast_gives_fp32_gradients_near_the_exact_ones():
    model = adapted()
    fill(model)
    loss_of(model).backward()
    expected = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    for parameter, exact in zip(trained(model).values(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert float((parameter.grad - exact).norm()) < 0.1 * float(exact.norm()) + 1e-4


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_one_block_mask_is_peft_shira():
    from peft import ShiraConfig

    torch.manual_seed(0)
    weight = nn.Linear(16, 16, bias=False)
    config = ShiraConfig(target_modules=["0"], r=2)  # 2 * (16 + 16) = 64 entries: one block of 8
    mask = torch.zeros(16, 16)
    mask[8:, :8] = 1
    config.mask_fn = lambda *args, **kwargs: mask
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(weight)), config)
    block_map = {"block_size": 8, "blocks": {"0": [[1, 0]]}}
    ours = get_peft_model(nn.Sequential(weight), SmtConfig(target_modules=["0"], block_map=block_map))
    values = torch.randn(64, generator=generator(1))
    x = torch.randn(5, 16, generator=generator(2))
    for model in (theirs, ours):
        parameter = next(iter(trained(model).values()))
        parameter.data.copy_(values)
        model(x).square().sum().backward()
    outputs = [model(x) for model in (theirs, ours)]
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    gradients = [next(iter(trained(model).values())).grad for model in (theirs, ours)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_all_blocks_are_full_fine_tuning_and_a_matrix_without_blocks_stays_what_it_was():
    base = llama(torch.float64)
    full = copy.deepcopy(base)
    model = adapted(copy.deepcopy(base), target_modules=["down_proj"], density=1.0)
    assert all(mask.all() for mask in masks(model).values())
    for name, parameter in full.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    ours, _ = train(model, trained(model).values())
    truth, _ = train(full, [p for p in full.parameters() if p.requires_grad])
    assert ours == pytest.approx(truth, rel=1e-9)
    few = adapted(block_map={"block_size": 8, "blocks": {"model.layers.1.self_attn.q_proj": [[0, 1]]}})
    assert list(layers(few)) == ["base_model.model.model.layers.1.self_attn.q_proj"]


def test_a_quantised_base_is_adapted_beside_its_weight():
    model = llama()
    for block in model.model.layers:
        block.self_attn.q_proj = Nf4Linear(block.self_attn.q_proj.weight.detach(), block.self_attn.q_proj)
    dense = llama()
    for mine, theirs in zip(dense.model.layers, model.model.layers, strict=True):
        mine.self_attn.q_proj.weight.data.copy_(theirs.self_attn.q_proj.dense())
    pair = [adapted(m, target_modules=["q_proj"], selection="magnitude") for m in (model, dense)]
    assert pair[0].peft_config["default"].block_map == pair[1].peft_config["default"].block_map
    assert not any(layer.in_place for layer in layers(pair[0]).values())
    losses = [train(m, trained(m).values())[0] for m in pair]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="quantised base"):
        pair[0].merge_and_unload()


def test_bad_maps_and_modes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"owlore\.adapters\.select_blocks"):
        adapted(selection="gradient")
    with pytest.raises(ValueError, match="no target module"):
        adapted(block_map={"block_size": 8, "blocks": {"model.layers.9.self_attn.q_proj": [[0, 0]]}})
    with pytest.raises(ValueError, match="at least one block"):
        adapted(block_map={"block_size": 8, "blocks": {}})
    with pytest.raises(ValueError, match="expected one of diagonal"):
        SmtConfig(selection="diagnal")
    with pytest.raises(ValueError, match="density"):
        SmtConfig(density=0.0)
    with pytest.raises(TypeError, match="expected a linear layer"):
        adapted(target_modules=["embed_tokens"])


def test_the_map_of_a_file_belongs_to_its_deltas(tmp_path):
    model = adapted(selection="random", seed=3)
    fill(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in layers(model).items():
        layout = layer.smt_blocks["default"].layout()
        assert saved[f"{name}.smt_blocks.index"].tolist() == [list(cell) for cell in layout.cells]
        delta = saved[f"{name}.smt_blocks.delta"]
        assert torch.equal(read_blocks(layer.get_delta_weight("default"), layout), delta)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, expected)
