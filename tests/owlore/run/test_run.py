"""A run refuses what cannot work before it costs anything, and says what it does."""

import re

import pytest
import torch
from makers import byte_tokenizer, save_tiny
from safetensors.torch import load_file, save_file

import htsr
import owlore
from htsr.errors import BadInput, NotFound, UsageError
from owlore.compare import begun_quantised
from owlore.io.metrics import spans
from owlore.models.trained import load_trained

ROWS = [{"prompt": f"the {a}: ", "completion": f"{a}."} for a in "abcdef"]


@pytest.mark.parametrize("wrong", ["data", "eval_data"])
def test_a_missing_data_file_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("owlore.run.inputs.load", lambda *_, **__: pytest.fail("the model was loaded"))
    named = {"data": ROWS, "eval_data": None} | {wrong: str(tmp_path / "gone.json")}
    with pytest.raises(NotFound, match=r"gone\.json"):
        owlore.train(tmp_path, steps=1, out=tmp_path / "run", **named)
    assert not (tmp_path / "run").exists()


def test_more_blocks_than_there_are_means_all_of_them_and_that_is_said(tmp_path, capsys):
    model = save_tiny(tmp_path / "model", blocks=4)
    run = owlore.train(model, ROWS, table="uniform", active=9, steps=2, out=tmp_path / "run", quiet=False)
    said = capsys.readouterr().err
    assert "note: --active got 9, the model has 4 blocks: all are always trained" in said
    assert "step 2/2: loss" in said and "blocks 0-3\n" in said
    assert [row["active_blocks"] for row in run.rows if row["split"] == "train"] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("numbers", "text"), [
    ([], ""), ([3], "3"), ([3, 4], "3,4"), ([0, 1, 2, 5, 8, 9], "0-2,5,8,9"), (range(30), "0-29"),
])  # fmt: skip
def test_three_and_more_numbers_in_a_row_are_shown_by_their_ends(numbers, text):
    assert spans(numbers) == text


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_the_tensor_named(tmp_path, lost):
    """transformers would draw it at random and say nothing at this verbosity."""
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors[lost]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for home in ({}, {"residency": "host"}):
        with pytest.raises(BadInput, match=f"holds no {re.escape(lost)}"):
            owlore.train(model, ROWS, table="uniform", steps=1, out=tmp_path / "run", **home)
    with pytest.raises(BadInput, match=f"holds no {re.escape(lost)}"):
        load_trained(str(model), device=torch.device("cpu"))


def test_an_encoder_is_no_causal_language_model(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "encoder")
    byte_tokenizer(64).save_pretrained(tmp_path / "encoder")
    with pytest.raises(BadInput, match="not an encoder"):
        owlore.train(tmp_path / "encoder", ROWS, table="uniform", steps=1, out=tmp_path / "run")


def test_rows_that_train_nothing_are_warned_about_and_have_no_part_in_the_speed(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": ""}] * 5 + ROWS[:3]
    run = owlore.train(save_tiny(tmp_path / "model"), rows, table="uniform", batch=1, active=1, epochs=1,
                       out=tmp_path / "run", quiet=False)  # fmt: skip
    assert "note: 5 of 8 rows (62%) train nothing" in capsys.readouterr().err
    real = [row for row in run.rows if row["loss"] is not None]
    assert len(real) == 3
    seconds = [row["tokens"] / row["tokens_per_s"] for row in real]
    assert run.record["median_step_seconds"] == pytest.approx(sorted(seconds)[1])
    assert run.record["tokens_per_s"] == pytest.approx(sum(row["tokens"] for row in real) / sum(seconds))
    assert run.record["tokens"] == sum(row["tokens"] for row in run.rows)


def test_an_adapters_rank_beyond_the_smallest_side_is_refused_where_it_was_asked_for(tmp_path):
    model = save_tiny(tmp_path / "model")
    with pytest.raises(UsageError, match="--set r got 1000, expected at most 16"):
        owlore.train(model, ROWS, method="lora", set={"r": 1000}, steps=1, out=tmp_path / "run")


def test_a_table_in_memory_is_named_so_and_the_run_is_shown_in_a_line(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=2)
    table = htsr.scan(str(model), calibration=None, plots=False, quiet=True).table(rule="uniform", gamma=1)
    run = owlore.train(model, ROWS, table=table, steps=2, out=tmp_path / "run")
    assert run.record["config"]["table"] == "(table in memory)"
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}: owlore, 2 steps)"


@pytest.mark.parametrize("settings", [{"table": "uniform"}, {"method": "lora"}, {"table": "uniform", "frozen": "nf4"}],
                         ids=str)  # fmt: skip
def test_weights_are_readable_by_whom_the_configuration_is(tmp_path, settings):
    run = owlore.train(save_tiny(tmp_path / "model"), ROWS, steps=1, out=tmp_path / "run", **settings)
    files = list((run.directory / "model").iterdir())
    assert {file.suffix for file in files} >= {".safetensors", ".json"}
    assert len({file.stat().st_mode for file in files}) == 1


def test_losses_of_quantised_and_exact_blocks_are_told_apart_on_the_card(tmp_path):
    run = owlore.train(save_tiny(tmp_path / "model"), ROWS, table="uniform", frozen="nf4", eval_data=0.3, steps=2,
                       out=tmp_path / "run")  # fmt: skip
    record, card = run.record, (run.directory / "README.md").read_text()
    change = (
        f"{record['eval_loss_first']:.4f} -> {record['eval_loss_last_frozen']:.4f} with frozen blocks in nf4, "
        f"{record['eval_loss_last']:.4f} as exported"
    )
    assert change in card and change in repr(run)
    assert begun_quantised([run.directory]) == ["run"]


def test_an_attention_that_is_not_installed_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="--attn flash_attention_2: "):
        owlore.train(save_tiny(tmp_path / "model"), ROWS, table="uniform", steps=1, attn="flash_attention_2",
                     out=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_model_beside_a_folder_of_checkpoints_is_no_unfinished_run(tmp_path):
    model = save_tiny(tmp_path / "model")
    (model / "checkpoints").mkdir()
    assert load_trained(str(model), device=torch.device("cpu")).tokenizer is not None
