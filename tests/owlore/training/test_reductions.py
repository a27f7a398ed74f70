"""Degenerate settings of a method equal a simpler known one."""

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file
from torch import nn

import owlore

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


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
        assert (parameter.detach() - weights_of(run)[name]).norm() <= 1e-4 * parameter.detach().norm()


def test_all_blocks_at_full_rank_with_everything_on_is_full_fine_tuning(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3)
    common = {"steps": 6, "lr": 1e-3}
    full = owlore.train(model, ROWS, method="full", out=tmp_path / "full", **common)
    all_blocks = owlore.train(
        model, ROWS, table="uniform", active=3, rank="full", every=10, always_on="embeddings,norm,head",
        out=tmp_path / "all", **common,
    )  # fmt: skip
    assert full.history["loss"].tolist() == all_blocks.history["loss"].tolist()
    a, b = weights_of(full), weights_of(all_blocks)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_uniform_table_at_full_rank_is_lisa(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=5)
    common = {"steps": 8, "every": 2, "active": 2, "always_on": "embeddings,norm,head", "lr": 1e-3}
    lisa = owlore.train(model, ROWS, method="lisa", out=tmp_path / "lisa", **common)
    uniform = owlore.train(model, ROWS, table="uniform", rank="full", out=tmp_path / "owlore", **common)
    a, b = weights_of(lisa), weights_of(uniform)
    assert lisa.record["draws"] == uniform.record["draws"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_period_without_end_is_static_freezing_of_the_rest(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    run = owlore.train(model, ROWS, table="uniform", rank="full", active=1, every=100, steps=8, lr=1e-3,
                       out=tmp_path / "run")  # fmt: skip
    block = run.record["draws"].index(1)
    _, losses = plain_adamw(model, ROWS, 8, 1e-3, lambda m: list(m.model.layers[block].parameters()))
    assert run.history.query("split == 'train'")["loss"].tolist() == pytest.approx(losses, rel=1e-5)


def test_one_block_at_a_time_at_full_rank_is_badam(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    common = {"steps": 10, "every": 2, "active": 1, "draw": "cyclic", "lr": 1e-3, "table": "uniform"}
    badam = owlore.train(model, ROWS, method="badam", out=tmp_path / "badam", **common)
    ours = owlore.train(model, ROWS, rank="full", out=tmp_path / "owlore", **common)
    assert badam.record["draws"] == [2, 1, 1, 1]
    a, b = weights_of(badam), weights_of(ours)
    assert all(torch.equal(a[name], b[name]) for name in a)
