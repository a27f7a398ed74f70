"""A run refuses what cannot work before it costs anything."""

import pytest

import owlore
from htsr.errors import NotFound

ROWS = [{"prompt": f"the {a}: ", "completion": f"{a}."} for a in "abcdef"]


@pytest.mark.parametrize("wrong", ["data", "eval_data"])
def test_a_missing_data_file_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("owlore.train.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    named = {"data": ROWS, "eval_data": None} | {wrong: str(tmp_path / "gone.json")}
    with pytest.raises(NotFound, match=r"gone\.json"):
        owlore.train(tmp_path, steps=1, out=tmp_path / "run", **named)
    assert not (tmp_path / "run").exists()
