"""Ids decode to the text, masks to the answers, and nothing is lost but what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import BadInput
from owlore.data.examples import Example, alpaca_prompt
from owlore.data.formats import load_rows
from owlore.data.report import data_report, masked_text
from owlore.data.tokenise import Encoded, encode

TOKENIZERS = {
    "characters": makers.byte_tokenizer(),
    "byte-level": makers.bpe_tokenizer(),
    "spaced": makers.bpe_tokenizer(spaced=True),
}
EOS = "</s>"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def answers(tokenizer: Any, encoded: Encoded, row: int = 0) -> list[str]:
    """The trained stretches of a row as text."""
    text = masked_text(encoded, row, tokenizer)
    return [part.split("»")[0] for part in text.split("«")[1:]]


PAIRS = [
    ("the question is", " true"),
    ("the question is ", "true"),
    ("the sky\n", "is blue"),
    ("the sky is b", "lue"),  # a merge lies across the boundary
    ("the sky:", "\nthe answer"),
    ("a\n\n", "\nb"),
    ("", "the answer"),
    ("the end ", "x"),
]


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_the_boundary_between_prompt_and_answer_is_exact(tokenizer: Any, prompt: str, answer: str) -> None:
    encoded = encode([Example(prompt=prompt, answer=answer)], tokenizer, 64)
    ids, trained = encoded.row(0)
    start = int(np.argmax(trained))
    assert decoded(tokenizer, ids).removeprefix("<s>").removeprefix(" ") == prompt + answer + EOS
    assert trained[start:].all()
    # the prompt's ids are those that a user's request has
    assert ids[:start].tolist() == (tokenizer(prompt)["input_ids"] if prompt else ids[:start].tolist())
    assert ids[-1] == tokenizer.eos_token_id


@given(st.text(st.sampled_from("abc \n.é"), max_size=12), st.text(st.sampled_from("abc \n.é"), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_ids_decode_to_prompt_and_answer(prompt: str, answer: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids, trained = encode([Example(prompt=prompt, answer=answer)], tokenizer, 512).row(0)
    if answer.strip():
        assert decoded(tokenizer, ids[trained == 0]) == prompt
        assert decoded(tokenizer, ids[trained == 1]) == answer + EOS
    else:
        assert not trained.any()


def test_every_format_gives_the_same_tokens(tokenizer: Any) -> None:
    question, answer = "what is the colour of the sky", "the sky is blue"
    prompt = alpaca_prompt(question)
    forms: list[list[dict[str, Any]]] = [
        [{"instruction": question, "input": "", "output": answer}],
        [{"instruction": question, "output": answer}],
        [{"prompt": prompt, "completion": answer}],
        [{"prompt": prompt, "response": answer}],
        [{"question": question, "answer": answer}],
        [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}],
        [{"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}],
    ]
    first, *others = [encode(load_rows(form).examples, tokenizer, 512) for form in forms]
    assert answers(tokenizer, first) == [answer + EOS]
    for other in others:
        np.testing.assert_array_equal(other.ids, first.ids)
        np.testing.assert_array_equal(other.trained, first.trained)


def test_a_dialogue_without_a_template_trains_each_answer_and_its_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    turns = (("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    encoded = encode([Example(messages=turns)], tokenizer, 512)
    assert masked_text(encoded, 0, tokenizer) == (
        "be kind\n\n### Instruction:\none\n\n### Response:\n«two</s>»"
        "\n\n### Instruction:\nthree\n\n### Response:\n«four</s>»"
    )


def test_rows_longer_than_the_limit_are_cut_and_counted(tokenizer: Any) -> None:
    long = Example(prompt="the question is", answer=" true" * 50)
    short = Example(prompt="the", answer=" sky")
    whole, cut = encode([long, short], tokenizer, 1000), encode([long, short], tokenizer, 16)
    assert (whole.truncated, cut.truncated) == (0, 1)
    assert len(cut) == 2
    np.testing.assert_array_equal(cut.row(0)[0], whole.row(0)[0][:16])
    np.testing.assert_array_equal(cut.row(0)[1], whole.row(0)[1][:16])
    np.testing.assert_array_equal(cut.row(1)[0], whole.row(1)[0])


def test_a_row_of_exactly_the_limit_is_whole() -> None:
    tokenizer = TOKENIZERS["characters"]
    row = Example(prompt="ab", answer="cde")
    assert encode([row], tokenizer, 6).truncated == 0
    assert encode([row], tokenizer, 5).truncated == 1


def test_long_texts_become_windows_that_lose_nothing() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    text = "".join(f"the answer to question {i} is true or false.\n" for i in range(4000))
    encoded = encode([Example(text=text)], tokenizer, 128)
    lengths = np.diff(encoded.offsets)
    assert decoded(tokenizer, encoded.ids) == text + EOS
    assert (lengths[:-1] == 128).all()
    assert encoded.truncated == 0
    assert encoded.trained.all()


def test_empty_answers_train_nothing_and_keep_their_row(tokenizer: Any) -> None:
    rows = [Example(prompt="the sky", answer=a) for a in ("", "  ", "is blue")] + [Example(text="")]
    encoded = encode(rows, tokenizer, 64)
    assert len(encoded) == 4
    assert (encoded.trained_per_row > 0).tolist() == [False, False, True, False]
    report = data_report(encoded, tokenizer)
    assert (report.rows, report.empty) == (4, 3)


def test_data_without_a_trained_token_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="every answer is empty"):
        data_report(encode([Example(prompt="the sky", answer="")], tokenizer, 64), tokenizer)
    with pytest.raises(BadInput, match="raise --seq-len"):
        data_report(encode([Example(prompt="the sky " * 30, answer="blue")], tokenizer, 16), tokenizer)


def test_counts_are_those_of_the_masks(tokenizer: Any) -> None:
    examples = [Example(prompt="the sky", answer=" is blue" * i) for i in range(1, 9)] + [Example(text="the sky")]
    encoded = encode(examples, tokenizer, 16)
    expected = [int(encoded.row(i)[1][1:].sum()) for i in range(len(encoded))]
    report = data_report(encoded, tokenizer)
    assert encoded.trained_per_row.tolist() == expected
    assert report.trained_tokens == sum(expected)
    assert report.tokens == sum(len(encoded.row(i)[0]) for i in range(len(encoded)))
    assert report.trained_share == report.trained_tokens / report.tokens
    assert report.longest == 16


def test_the_sample_shows_no_control_characters() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    encoded = encode([Example(prompt="a\x1b[31m", answer="b\x07")], tokenizer, 64)
    assert data_report(encoded, tokenizer).sample == "a[31m«b</s>»"


def test_taken_rows_are_the_rows(tokenizer: Any) -> None:
    encoded = encode([Example(prompt=f"the {i}", answer=" sky" * i) for i in range(1, 6)], tokenizer, 12)
    some = encoded.take([3, 0])
    for new, old in enumerate([3, 0]):
        for mine, theirs in zip(some.row(new), encoded.row(old), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert some.truncated == int(encoded.cut[[3, 0]].sum())


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = makers.byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="end-of-sequence"):
        encode([Example(prompt="a", answer="b")], tokenizer, 8)


def test_real_rows_keep_their_answers(shared: Path, stories: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = load_rows(shared / "data" / "commonsense" / "train_61k.json").examples[::500]
    encoded = encode(rows, tokenizer, 2048)
    assert encoded.truncated == 0
    for i, example in enumerate(rows):
        ids, trained = encoded.row(i)
        assert decoded(tokenizer, ids[trained == 1]) == f"{example.answer}{EOS}"
        assert decoded(tokenizer, ids) == f"<s> {example.prompt}{example.answer}{EOS}"
