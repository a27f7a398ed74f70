"""A module of the caller's: what was put on it counts, a run that is refused leaves it alone, and what cannot be
trained is said before anything is done."""

import copy

import pytest
import torch
from makers import byte_tokenizer, tiny_llama

import owlore
from htsr.errors import BadInput, UsageError

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
PLACEMENTS = [{}, {"checkpointing": "on"}, {"residency": "host"}, {"frozen": "int8"}]


def train(model, out, **settings):
    sampled = {"table": "uniform", "every": 3, "active": 2, "rank": 4} if "method" not in settings else {}
    return owlore.train(model, ROWS, out=out, **{"tokenizer": byte_tokenizer(), "steps": 4, **sampled, **settings})


def losses(run):
    return run.history.query("split == 'train'")["loss"].tolist()


def tripled(module):
    """A forward of somebody's in place of the module's own."""
    own = module.forward
    module.forward = lambda *args, **kwargs: 3 * own(*args, **kwargs)
    return module.forward


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_forward_that_was_set_on_a_linear_map_or_a_block_is_what_is_trained_and_stays(tmp_path, placement):
    def changed():
        model = tiny_llama(blocks=3)
        kept = [(block.mlp.up_proj, tripled(block.mlp.up_proj)) for block in model.model.layers]
        for block in model.model.layers:
            block.forward = lambda *args, own=block.forward, **kwargs: own(*args, **kwargs)
            kept.append((block, block.forward))
        return model, kept

    (model, kept), (expected, _) = changed(), changed()
    # At rank `full` and with the default placement no linear map's forward is replaced.
    run = train(model, tmp_path / "run", lr=1e-9, **placement)
    plain = train(expected, tmp_path / "plain", lr=1e-9, rank="full")
    assert losses(run) == pytest.approx(losses(plain), rel=2e-2 if "frozen" in placement else 1e-6)
    unchanged = train(tiny_llama(blocks=3), tmp_path / "unchanged", lr=1e-9)
    assert abs(losses(unchanged)[0] - losses(plain)[0]) > 0.1  # it is seen
    assert all(vars(module)["forward"] is forward for module, forward in kept)


@pytest.mark.parametrize("placement", [{}, {"frozen": "int8"}], ids=str)
def test_a_linear_map_may_be_called_by_the_name_of_its_argument(tmp_path, placement):
    def naming():
        model = tiny_llama(blocks=3)
        for block in model.model.layers:
            mlp = block.mlp
            mlp.forward = lambda x, m=mlp: m.down_proj(input=m.act_fn(m.gate_proj(input=x)) * m.up_proj(input=x))
        return model

    named, plain = (train(m, tmp_path / str(i), **placement) for i, m in enumerate((naming(), tiny_llama(blocks=3))))
    assert losses(named) == losses(plain)


def test_a_hook_on_a_weight_gets_the_gradient_and_what_it_gives_is_trained(tmp_path):
    model = tiny_llama(blocks=2)
    before = copy.deepcopy(model)
    weights = [block.mlp.up_proj.weight for block in model.model.layers]
    for weight in weights:
        mask = torch.zeros_like(weight)
        mask[:3] = 1
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    train(model, tmp_path / "run", steps=6)
    for weight, block in zip(weights, before.model.layers, strict=True):
        moved = (weight != block.mlp.up_proj.weight).any(1)
        assert moved[:3].all() and not moved[3:].any()


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_run_that_is_refused_at_its_last_check_leaves_the_model_as_it_was(tmp_path, placement):
    train(tiny_llama(blocks=3), tmp_path / "run", **placement)
    model, expected = tiny_llama(blocks=3), tiny_llama(blocks=3)
    with pytest.raises(UsageError, match="lr is"):
        train(model, tmp_path / "run", lr=1e-2, resume=True, **placement)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    again, fresh = (train(m, tmp_path / str(i), method="full") for i, m in enumerate((model, expected)))
    assert losses(again) == losses(fresh)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_failure_after_everything_was_put_on_the_model_takes_it_off_again(tmp_path, monkeypatch, placement):
    from owlore.training.trainer import Trainer

    train(tiny_llama(blocks=3), tmp_path / "run", **placement)
    model, expected = tiny_llama(blocks=3), tiny_llama(blocks=3)

    def fail(self, saved):
        raise BadInput("the checkpoint is damaged")

    monkeypatch.setattr(Trainer, "restore", fail)
    with pytest.raises(BadInput, match="damaged"):
        train(model, tmp_path / "run", resume=True, **placement)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_run_inside_no_grad_trains_all_the_same(tmp_path):
    inside, outside = tiny_llama(blocks=2), tiny_llama(blocks=2)
    with torch.no_grad():
        inner = train(inside, tmp_path / "inside")
        assert not torch.is_grad_enabled()
    assert losses(inner) == losses(train(outside, tmp_path / "outside"))
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), outside.parameters(), strict=True))


def test_another_default_dtype_changes_nothing_about_the_bases(tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        assert train(tiny_llama(blocks=2).float(), tmp_path / "run").history["grad_norm"].notna().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_around_a_run_is_refused(tmp_path):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="autocast"):
        train(tiny_llama(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_trained_are_refused(tmp_path):
    with torch.inference_mode():
        made = tiny_llama()
    for model, reason in ((made, "inference_mode"), (tiny_llama().double(), "float64")):
        with pytest.raises(BadInput, match=reason):
            train(model, tmp_path / "run")
    assert train(tiny_llama().double(), tmp_path / "run", dtype="float32").record["steps"] == 4


def test_a_model_with_adapter_layers_is_refused_and_trains_when_they_are_merged(tmp_path):
    model = tiny_llama()
    run = train(model, tmp_path / "lora", method="lora")
    with pytest.raises(BadInput, match="merge_and_unload"):
        train(model, tmp_path / "full")
    merged = run.model.merge_and_unload()
    train(merged, tmp_path / "full")
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    with pytest.raises(BadInput, match="the model has 20 embeddings"):
        train(tiny_llama(vocab=20), tmp_path / "run")


def test_a_padding_token_beyond_the_models_rows_is_never_read(tmp_path):
    """Llama tokenizers that were given a <pad> the model has no row for."""
    padded, plain = byte_tokenizer(), byte_tokenizer()
    padded.add_special_tokens({"pad_token": "<padding>"})
    runs = [
        train(tiny_llama(vocab=padded.pad_token_id), tmp_path / str(number), tokenizer=tokenizer)
        for number, tokenizer in enumerate((padded, plain))
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_a_model_that_keeps_fp32_between_16_bit_blocks_is_trained(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4, residual_in_fp32=True)
    run = train(MambaForCausalLM(config).bfloat16(), tmp_path / "run")
    assert all(loss > 0 for loss in losses(run))


def test_blocks_that_return_lists_are_streamed(tmp_path):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=128)
    torch.manual_seed(0)
    model = OpenAIGPTLMHeadModel(config)
    other = copy.deepcopy(model)
    assert losses(train(model, tmp_path / "a")) == losses(train(other, tmp_path / "b", residency="host"))
