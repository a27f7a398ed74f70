"""Runs whose rows are grouped or packed: same rows, same loss, exact resume."""

import numpy as np
import pytest
import torch
from makers import FAMILIES, save_tiny, tiny_llama, tiny_models
from safetensors.torch import load_file

import owlore
from htsr.errors import BadInput, UsageError
from owlore.data.batches import collate
from owlore.data.packing import collate_packed
from owlore.data.tokenise import Encoded
from owlore.training.loss import CausalLoss

ROWS = [{"prompt": f"the {a * n}: ", "completion": f"{a}, " * n} for a in "abcdefg" for n in (1, 3, 6)]
SETTINGS = {
    "epochs": 2, "every": 2, "active": 2, "rank": 8, "batch": 2, "accum": 2, "lr": 5e-3, "schedule": "constant",
    "table": "uniform", "seq_len": 96,
}  # fmt: skip


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


@pytest.mark.parametrize("option", ["group_by_length", "packing"])
def test_an_arranged_run_goes_on_bit_for_bit_and_shows_every_token(tmp_path, option):
    model = save_tiny(tmp_path / "model", attention_dropout=0.1)
    settings = SETTINGS | {option: True}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    plain = owlore.train(model, ROWS, out=tmp_path / "plain", **SETTINGS)
    assert whole.record["tokens"] == plain.record["tokens"]
    assert whole.history["tokens"].tolist() != plain.history["tokens"].tolist()
    owlore.train(model, ROWS, out=tmp_path / "cut", **{**settings, "epochs": None, "steps": 2})
    resumed = owlore.train(model, ROWS, out=tmp_path / "cut", resume=True, **settings)
    assert all(torch.equal(tensor, weights_of(resumed)[name]) for name, tensor in weights_of(whole).items())
    exact = ["step", "epoch", "loss", "tokens", "active_blocks"]
    assert whole.history[exact].to_json() == resumed.history[exact].to_json()
    assert resumed.history["epoch"].iloc[-1] == 2.0


def encoded_rows(lengths, seed=0):
    """Random rows of these lengths, three quarters of whose tokens are trained, first tokens among them."""
    stream = np.random.default_rng(seed)
    total = sum(lengths)
    return Encoded(
        ids=stream.integers(3, 60, total).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        trained=(stream.random(total) < 0.75).astype(np.uint8),
        cut=np.zeros(len(lengths), bool),
        groups=np.arange(len(lengths)),
        pad_id=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_the_gradients_that_they_have_alone(family):
    model = tiny_models()[family]()
    loss = CausalLoss(model)
    assert loss.isolates_packed_rows()
    data = encoded_rows([5, 1, 12, 9, 3, 20, 7])
    packed = collate_packed(data, [(0, 1, 2), (3, 4), (5, 6)])
    rows = [collate(data, [row]) for row in range(len(data))]
    assert packed.num_trained == sum(row.num_trained for row in rows)
    together = loss(packed.input_ids, packed.labels, packed.position_ids)
    alone = sum(loss(row.input_ids, row.labels) for row in rows)
    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(together, parameters), torch.autograd.grad(alone, parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_logits_that_they_have_alone(family):
    model = tiny_models()[family]()
    data = encoded_rows([11, 1, 12])
    batch = collate_packed(data, [(0, 1, 2)])
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        alone = [model(input_ids=collate(data, [row]).input_ids).logits[0] for row in range(3)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def leaky(kind):
    """A tiny Llama whose packed rows see each other, or whose positions are not what it is told."""
    model = tiny_llama()
    forward = model.model.forward

    def run(input_ids, position_ids=None, **options):
        if position_ids is None or kind == "mask":  # in one sequence, counted through
            return forward(input_ids=input_ids, **options)
        return forward(input_ids=input_ids, position_ids=position_ids * 2, **options)

    model.model.forward = run
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mask", "positions"])
def test_a_model_whose_packed_rows_are_not_what_they_are_alone_is_found_out(kind, dtype):
    assert CausalLoss(tiny_llama(dtype=dtype)).isolates_packed_rows()
    assert not CausalLoss(leaky(kind).to(dtype)).isolates_packed_rows()


def test_packing_is_refused_where_rows_would_see_each_other(tmp_path):
    from makers import byte_tokenizer

    with pytest.raises(BadInput, match=r"--packing.*--group-by-length"):
        owlore.train(leaky("mask"), ROWS, tokenizer=byte_tokenizer(), out=tmp_path / "run", packing=True, **SETTINGS)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="one of them"):
        owlore.train(tiny_llama(), ROWS, packing=True, group_by_length=True)


def test_a_packed_step_over_all_rows_is_the_unpacked_step(tmp_path):
    model = save_tiny(tmp_path / "model")
    settings = SETTINGS | {"epochs": 1, "accum": 1}
    plain = owlore.train(model, ROWS, out=tmp_path / "plain", **settings | {"batch": len(ROWS)})
    packed = owlore.train(model, ROWS, out=tmp_path / "packed", packing=True, **settings | {"batch": 12})
    assert plain.history["epoch"].tolist() == packed.history["epoch"].tolist() == [1.0]
    for name in ("loss", "grad_norm", "tokens"):
        assert packed.history[name][0] == pytest.approx(plain.history[name][0], rel=1e-5)
