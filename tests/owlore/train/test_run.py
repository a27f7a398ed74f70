"""A run refuses what cannot work before it costs anything, and says what it does."""

import pytest
from makers import save_tiny

import owlore
from htsr.errors import NotFound
from owlore.train.metrics import spans

ROWS = [{"prompt": f"the {a}: ", "completion": f"{a}."} for a in "abcdef"]


@pytest.mark.parametrize("wrong", ["data", "eval_data"])
def test_a_missing_data_file_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("owlore.train.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
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
