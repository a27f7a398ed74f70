"""With a chat template exactly the assistant's turns are trained, their end-of-turn token included."""

from __future__ import annotations

from typing import Any

import makers
import pytest

from htsr.errors import BadInput
from owlore.data.examples import Example
from owlore.data.report import masked_text
from owlore.data.tokenise import encode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# turns named inside, no prompt for generation, no end-of-turn token
NAMED = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}\n{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# as reasoning models do: the last answer carries an (empty) thought, earlier ones lose it
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
TURNS = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))


def masked(template: str, turns: tuple[tuple[str, str], ...], *, seq_len: int = 512, **settings: Any) -> list[str]:
    tokenizer = makers.bpe_tokenizer(**settings)
    tokenizer.chat_template = template
    encoded = encode([Example(messages=turns)], tokenizer, seq_len)
    return [masked_text(encoded, i, tokenizer) for i in range(len(encoded))]


def test_chatml_trains_every_answer_with_its_end_of_turn() -> None:
    assert masked(CHATML, (("system", "be kind"), *TURNS)) == [
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n«four<|im_end|>»\n"
    ]


def test_the_ids_are_those_of_the_rendered_dialogue() -> None:
    tokenizer = makers.bpe_tokenizer()
    tokenizer.chat_template = CHATML
    encoded = encode([Example(messages=TURNS)], tokenizer, 512)
    dialogue = [{"role": role, "content": text} for role, text in TURNS]
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(dialogue, return_dict=False)
    request = tokenizer.apply_chat_template(dialogue[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.ids[: len(request)].tolist() == request
    assert not encoded.trained[: len(request)].any()
    assert encoded.trained[len(request)]


def test_a_template_that_names_the_speaker_trains_only_what_is_said() -> None:
    assert masked(NAMED, TURNS) == ["USER: one\nASSISTANT: «two\n»USER: three\nASSISTANT: «four\n</s>»"]


def test_the_space_before_an_answer_belongs_to_it() -> None:
    assert masked(LLAMA2, TURNS) == ["[INST] one [/INST]« two </s>»[INST] three [/INST]« four </s>»"]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each() -> None:
    first = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert masked(THINKING, TURNS) == [
        first + "«<think></think>two<|im_end|>»\n",
        first + "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
        "«<think></think>four<|im_end|>»\n",
    ]


def test_trailing_questions_and_empty_answers_train_nothing() -> None:
    assert masked(CHATML, (*TURNS[:2], ("user", "and?")))[0].endswith("«two<|im_end|>»\n")
    silent = masked(CHATML, (("user", "one"), ("assistant", ""), ("user", "three"), ("assistant", "four")))
    assert silent[0].count("«") == 1
    assert "«four<|im_end|>»" in silent[0]
    assert "«" not in masked(CHATML, (("user", "one"),))[0]


def test_a_dialogue_that_the_assistant_opens_is_trained_too() -> None:
    text = masked(CHATML, (("assistant", "hello"), ("user", "one"), ("assistant", "two")))[0]
    assert text.startswith("<|im_start|>assistant\n«hello<|im_end|>»")
    assert "«two<|im_end|>»" in text


def test_a_spaced_tokenizer_adds_no_space_and_no_second_start() -> None:
    (text,) = masked("{{ bos_token }}" + LLAMA2, TURNS, spaced=True)
    assert text.count("<s>") == 1
    assert text.replace("«", "").replace("»", "").replace("<s> ", "<s>") == (
        "<s>[INST] one [/INST] two </s>[INST] three [/INST] four </s>"
    )


def test_dialogues_are_cut_like_any_row() -> None:
    (whole,), (cut,) = masked(CHATML, TURNS), masked(CHATML, TURNS, seq_len=20)
    assert whole.startswith(cut.removesuffix("»"))
    assert len(cut) < len(whole)


def test_a_dialogue_that_the_template_refuses_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"row 1: .*\(assistant, user\): roles must alternate"):
        masked(STRICT, (("assistant", "a"), ("user", "b")))


def test_prompts_with_answers_are_as_they_are_in_spite_of_a_template() -> None:
    tokenizer = makers.bpe_tokenizer()
    tokenizer.chat_template = CHATML
    encoded = encode([Example(prompt="one ", answer="two")], tokenizer, 64)
    assert masked_text(encoded, 0, tokenizer) == "one «two</s>»"
