"""The chunked loss is the model's own loss, with its own gradients, in every family."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from makers import FAMILIES, tiny_llama, tiny_models

from owlore.training.loss import CausalLoss


def batch():
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (3, 14), generator=stream)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=stream) < 0.4] = -100
    return ids, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    model = tiny_models()[family]()
    ids, labels = batch()
    loss = CausalLoss(model)
    assert loss.chunked
    count = int((labels[:, 1:] != -100).sum())
    ours = loss(ids, labels) / count
    own = model(input_ids=ids, labels=labels).loss
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, a, b in zip(
        names, torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8, name


def test_right_padding_changes_no_loss():
    model = tiny_llama()
    ids, labels = batch()
    padded = F.pad(ids, (0, 5), value=0), F.pad(labels, (0, 5), value=-100)
    loss = CausalLoss(model)
    assert float(loss(*padded).detach()) == pytest.approx(float(loss(ids, labels).detach()), rel=1e-6)


def test_a_model_whose_logits_are_more_than_its_head_gets_its_own_loss():
    model = tiny_llama()
    forward = model.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = shifted
    ids, labels = batch()
    loss = CausalLoss(model)
    assert not loss.chunked
    logits = shifted(input_ids=ids).logits[:, :-1].flatten(0, 1)
    truth = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert float(loss(ids, labels).detach()) == pytest.approx(float(truth.detach()), rel=1e-6)


def test_rows_without_positions_are_not_searched_for_several_sequences_and_packed_ones_are(monkeypatch):
    from transformers import masking_utils

    asked, own = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: (asked.append(1), own(ids))[1])
    loss, ids = CausalLoss(tiny_llama()), torch.arange(4, 16)[None]
    asked.clear()
    alone = loss(ids, ids)
    assert not asked
    again = loss(ids, ids, torch.arange(12)[None])
    assert asked and torch.equal(alone, again)
    asked.clear()
    loss(ids, ids, torch.arange(6).repeat(2)[None])
    assert asked


def test_a_model_with_dropout_is_probed_without_it_and_stays_in_its_mode():
    model = tiny_llama(attention_dropout=0.5).train()
    loss = CausalLoss(model)
    assert loss.chunked and loss.isolates_packed_rows() and model.training
    assert CausalLoss(model.eval()).isolates_packed_rows() and not model.training
