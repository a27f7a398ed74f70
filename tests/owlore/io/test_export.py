"""Exports: frozen bits stay, trained blocks change, dtypes are the checkpoint's, plain transformers loads them."""

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_undrawn_blocks_are_bit_identical_in_the_export_and_drawn_ones_changed(tmp_path, dtype, tied):
    model = save_tiny(tmp_path / "model", blocks=6, tied=tied, dtype=getattr(torch, dtype))
    run = owlore.train(model, ROWS, table="uniform", steps=9, every=3, active=1, rank=8, lr=1e-2, out=tmp_path / "run")
    before, after = load_file(model / "model.safetensors"), weights_of(run)
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {getattr(torch, dtype)}
    draws = run.record["draws"]
    assert sum(draws) == 3 and 0 in draws
    for name in before:
        block = int(name.split(".")[2]) if ".layers." in name else None
        drawn = block is not None and draws[block] > 0
        assert torch.equal(before[name], after[name]) != drawn, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_in_plain_transformers_and_gives_the_same_logits(tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_tiny(tmp_path / "model", dtype=getattr(torch, dtype))
    run = owlore.train(model, ROWS, table="uniform", steps=4, every=2, active=2, rank=8, lr=1e-2, out=tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "model")
    assert plain.dtype == getattr(torch, dtype)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, run.model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(run.directory / "model")
    assert tokenizer("the end").input_ids == run.tokenizer("the end").input_ids


def test_training_wider_than_the_checkpoint_exports_in_its_dtype_and_keeps_frozen_bits(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4, dtype=torch.bfloat16)
    run = owlore.train(
        model, ROWS, table="uniform", steps=3, active=1, rank=8, lr=1e-2, weights="fp32", out=tmp_path / "run"
    )
    assert run.model.dtype == torch.float32
    before, after = load_file(model / "model.safetensors"), weights_of(run)
    drawn = [i for i, n in enumerate(run.record["draws"]) if n]
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    for name in before:
        assert torch.equal(before[name], after[name]) != any(f".layers.{i}." in name for i in drawn)


def test_loading_narrower_than_the_checkpoint_loses_no_bit_of_what_was_never_trained(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)
    run = owlore.train(
        model, ROWS, table="uniform", steps=3, active=1, rank=8, lr=1e-2, dtype="bfloat16", out=tmp_path / "run"
    )
    assert run.model.dtype == torch.bfloat16
    before, after = load_file(model / "model.safetensors"), weights_of(run)
    drawn = [i for i, n in enumerate(run.record["draws"]) if n]
    assert {t.dtype for t in after.values()} == {torch.float32}
    for name in before:
        assert torch.equal(before[name], after[name]) != any(f".layers.{i}." in name for i in drawn)
