"""Every format of the same content gives the same examples; what cannot be read says where and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from htsr.errors import BadInput, NotFound
from owlore.data.examples import Example, alpaca_prompt
from owlore.data.formats import load_rows

CONTENT = [("name the sky's colour", "blue, mostly"), ('say "hi",\ntwice', "hi hi"), ("what is 2 + 2?", "4")]
WANTED = [Example(prompt=alpaca_prompt(question), answer=answer) for question, answer in CONTENT]


def alpaca() -> list[dict[str, Any]]:
    return [{"instruction": q, "input": "", "output": a} for q, a in CONTENT]


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": alpaca_prompt(q), "completion": a} for q, a in CONTENT]


def write(path: Path, content: Any, *, lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def test_the_alpaca_prompt_is_stanfords() -> None:
    assert alpaca_prompt("Do it.").startswith(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Response:"
    )
    assert alpaca_prompt("Do it.", "With this.").startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n"
        "### Response:"
    )


@pytest.mark.parametrize("rows", [alpaca, pairs], ids=["alpaca", "prompt-completion"])
@pytest.mark.parametrize("form", ["json", "jsonl", "indented", "wrapped", "csv", "tsv", "parquet", "list", "frame"])
def test_every_container_gives_the_same_examples(tmp_path: Path, rows: Any, form: str) -> None:
    content = rows()
    frame = pd.DataFrame(content)
    data: Any = tmp_path / "rows"  # no suffix: the content decides
    if form == "json":
        write(data, content)
    elif form == "jsonl":
        write(data, content, lines=True)
    elif form == "indented":
        data.write_text(json.dumps(content, indent=2))
    elif form == "wrapped":
        data.write_text(json.dumps({"version": 1, "data": content}, indent=2))
    elif form == "csv":
        frame.to_csv(data, index=False)
    elif form == "tsv":
        frame.to_csv(data, index=False, sep="\t")
    elif form == "parquet":
        frame.to_parquet(data)
    else:
        data = content if form == "list" else frame
    loaded = load_rows(data)
    assert loaded.examples == WANTED
    assert loaded.provenance["rows"] == 3


def test_a_misleading_name_does_not_matter(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "rows.txt", alpaca())).examples == WANTED
    assert load_rows(write(tmp_path / "rows.csv", pairs(), lines=True)).examples == WANTED


def test_a_datasets_dataset_is_rows() -> None:
    datasets = pytest.importorskip("datasets")
    assert load_rows(datasets.Dataset.from_list(alpaca())).examples == WANTED
    assert load_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs())})).examples == WANTED


def test_a_saved_dataset_directory_is_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(alpaca()).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved").examples == WANTED


def test_messages_and_sharegpt_are_the_same_dialogue(tmp_path: Path) -> None:
    turns = (("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao"))
    messages = [{"messages": [{"role": r, "content": t} for r, t in turns]}]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"conversations": [{"from": names[r], "value": t} for r, t in turns]}]
    beside = [{"system": "be brief", "conversations": [{"from": names[r], "value": t} for r, t in turns[1:]]}]
    parts = [{"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]}]
    split = [
        {
            "prompt": [{"role": r, "content": t} for r, t in turns[:-1]],
            "completion": [{"role": r, "content": t} for r, t in turns[-1:]],
        }
    ]
    pd.DataFrame(messages).to_parquet(tmp_path / "rows.parquet")
    for data in (messages, sharegpt, beside, parts, split, tmp_path / "rows.parquet"):
        assert load_rows(data).examples == [Example(messages=turns)]


def test_gsm8k_columns_are_an_instruction_and_its_answer() -> None:
    rows = [{"question": "2 + 2?", "answer": "4"}]
    assert load_rows(rows).examples == [Example(prompt=alpaca_prompt("2 + 2?"), answer="4")]
    with pytest.raises(BadInput, match="choice0"):  # the choices would be lost
        load_rows([{"question": "2 + 2?", "choice0": "3", "choice1": "4", "answer": "1"}])


def test_missing_cells_are_empty_and_numbers_are_written_out() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "completion": ["x", None, float("nan")]})
    assert [e.answer for e in load_rows(frame).examples] == ["x", "", ""]
    assert load_rows([{"prompt": "a", "completion": 4}]).examples[0].answer == "4"


def test_a_text_file_is_one_text_and_text_rows_are_several(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one, two\n\nthree\n")
    assert load_rows(tmp_path / "book.txt").examples == [Example(text="one, two\n\nthree\n")]
    assert load_rows([{"text": "a"}, {"text": "b"}]).examples == [Example(text="a"), Example(text="b")]


def test_provenance_holds_the_hash_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", alpaca())
    provenance = load_rows(path).provenance
    assert provenance == {
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 3,
        "format": "alpaca",
    }
    assert load_rows(alpaca()).provenance["sha256"] == load_rows(alpaca()).provenance["sha256"]
    assert load_rows(alpaca()).provenance["sha256"] != load_rows(alpaca()[:2]).provenance["sha256"]


BAD = {
    "columns.json": ('[{"foo": 1, "bar": 2}]', "got the columns foo, bar; expected one of: instruction"),
    "line.jsonl": ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", \n', "line 3 is not valid JSON"),
    "array.json": ('[{"prompt": "a",\n "completion": }]', "line 2 is not valid JSON"),
    "spread.json": ('{\n "data": [\n {"prompt": }]}', "line 3 is not valid JSON"),
    "garbage.jsonl": ("no json at all\n", "line 1 is not valid JSON"),
    "nan.jsonl": ('{"prompt": "a", "completion": NaN}\n', "NaN"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "strings.json": ('["a", "b"]', "row 1 is str"),
    "empty.jsonl": ("", "holds no rows"),
    "none.json": ("[]", "holds no rows"),
    "missing.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "row 2 .* no column 'completion'"),
    "kind.json": ('[{"prompt": "a", "completion": ["b"]}]', "row 1 .* list in column 'completion'"),
    "role.json": ('[{"messages": [{"role": "wizard", "content": "b"}]}]', "role 'wizard'; expected one of"),
    "half.json": ('[{"prompt": "a", "completion": "\\ud83d"}]', "surrogate"),
    "header.csv": ("foo,bar\n1,2\n", "got the columns foo, bar"),
    "binary.txt": (b"\xff\xfe\x00\x01", "byte 0 is not UTF-8"),
    "broken.parquet": (b"PAR1 and then nonsense", "not a readable parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_data_say_what_and_where(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        load_rows(path)


@pytest.mark.parametrize("name", ["missing.json", "./nowhere", "/no/such/file", "a b c", "data/rows.csv"])
def test_a_missing_path_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match="no such file"):
        load_rows(name)


def test_a_data_set_name_offline_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="no such Hugging Face data set"):
        load_rows("owlore-tests/there-is-no-such-data-set")


def test_objects_of_other_kinds_are_refused() -> None:
    for data in (3, [1, 2], {"a": 1}, ["text"]):
        with pytest.raises(BadInput):
            load_rows(data)


def test_the_packaged_data_are_instructions() -> None:
    rows = load_rows("demo-data")
    assert len(rows) >= 200
    assert rows.provenance["format"] == "alpaca"
    assert all(example.answer for example in rows.examples)


def test_the_shared_sets_load(shared: Path) -> None:
    data = shared / "data"
    assert len(load_rows(data / "arithmetic" / "gsm8k" / "test.jsonl")) == 1319
    assert load_rows(data / "text" / "c4_demo.jsonl").provenance["format"] == "text"
    assert len(load_rows(data / "instruct" / "alpaca_en_demo.json")) == 999
    assert len(load_rows(data / "commonsense" / "train_61k.json")) == 61_395
