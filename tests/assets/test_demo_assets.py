"""The packaged demo model, calibration text and demo data are what their cards say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "htsr" / "assets"
DEMO = ASSETS / "demo"
DATA = ROOT / "owlore" / "assets" / "demo-data.jsonl"
STUDY = ROOT / "reports" / "studies" / "demo-model"


def script(name: str) -> ModuleType:
    """A script of the study as a module."""
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def card() -> str:
    return (DEMO / "README.md").read_text(encoding="utf-8")


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_the_demo_directory_is_below_6_megabytes() -> None:
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file()) <= 6_000_000


def test_the_demo_is_a_llama_of_at_least_6_blocks_in_float32() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert found == {"F32"}


def structure(model: Any) -> list[float]:
    """For every matrix its largest singular value over that of the same entries in random order."""
    generator = torch.Generator().manual_seed(0)
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    shuffled = [m.flatten()[torch.randperm(m.numel(), generator=generator)].view_as(m) for m in matrices]
    norm = torch.linalg.matrix_norm
    return [float(norm(m, 2) / norm(s, 2)) for m, s in zip(matrices, shuffled, strict=True)]


def test_every_matrix_of_the_demo_has_structure_that_no_initial_matrix_has(model: Any) -> None:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = AutoModelForCausalLM.from_config(model.config)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert min(structure(model)) > max(structure(untrained)) + 0.02


@pytest.mark.parametrize(
    "text",
    [
        "In the beginning God created the heaven and the earth.",
        "",
        " two  spaces\n\n\ttab",
        "### Größe: 42 € — 日本語 🦉",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_of_tokenizer_and_config_agree(tokenizer: Any, model: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == getattr(model.generation_config, name)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == model.config.vocab_size


def test_heldout_perplexity_is_the_cards(model: Any, tokenizer: Any, card: str) -> None:
    """Recomputed here, not with the study's function: <s> chapter </s> joined, windows of 512, first token unscored."""
    stated = float(re.search(r"Held-out perplexity: ([\d.]+) per token", card)[1])  # type: ignore[index]
    chapters = (DEMO / "heldout.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [t for chapter in chapters for t in [bos, *tokenizer(chapter)["input_ids"], eos]]
    total, count = 0.0, 0
    for start in range(0, len(ids), 512):
        window = torch.tensor([ids[start : start + 512]])
        with torch.no_grad():
            log_p = model(input_ids=window).logits.double().log_softmax(-1)
        total -= float(log_p[0, :-1].gather(1, window[0, 1:, None]).sum())
        count += window.shape[1] - 1
    assert float(torch.tensor(total / count).exp()) == pytest.approx(stated, rel=2e-3)
    assert stated < 25  # 1,024 would be guessing


def test_heldout_text_is_whole_books() -> None:
    headings = re.findall(r"(?m)^((?:Ruth|Jonah|James) \d+)$", (DEMO / "heldout.txt").read_text(encoding="utf-8"))
    expected = [f"{book} {n + 1}" for book, count in (("Ruth", 4), ("Jonah", 4), ("James", 5)) for n in range(count)]
    assert headings == expected


def test_outliers_of_the_card_are_those_of_the_weights(model: Any, tokenizer: Any, card: str) -> None:
    measure = script("measure")
    windows = measure.calibration_windows((ASSETS / "calibration.txt").read_text(encoding="utf-8"), tokenizer)
    stated = [float(m) for m in re.findall(r"(?m)^\| \d+ \| ([\d.]+) \|", card)]
    found = [lod for lod, _ in measure.block_outliers(model, windows)]
    assert stated == pytest.approx(found, abs=2e-3)


def test_demo_data_is_what_its_script_writes() -> None:
    study = script("make_demo_data")
    assert study.as_jsonl(study.rows()).encode() == DATA.read_bytes()


def test_demo_data_has_300_to_600_distinct_short_alpaca_rows(tokenizer: Any) -> None:
    found = rows()
    assert 300 <= len(found) <= 600
    assert all(set(r) == {"instruction", "input", "output"} and all(r.values()) for r in found)
    assert len({(r["instruction"], r["input"]) for r in found}) == len(found)
    assert max(len(tokenizer(" ".join(r.values()))["input_ids"]) for r in found) <= 96


@pytest.mark.parametrize(
    ("sentence", "answers"),
    [
        (r"And (\w+) begat (\w+)\.", ["The father of {1} is {0}.", "The son of {0} is {1}."]),
        (
            r"And (\w+) reigned in (\w+) (\w+) years\.",
            ["The king was {0}.", "He reigned in {1}.", "He reigned {2} years."],
        ),
        (
            r"And (\w+) gave unto (\w+) (\w+) and (\w+)\.",
            ["He gave {2} and {3}.", "It was given by {0}.", "It was given unto {1}."],
        ),
        (r"And (\w+) said unto (\w+), (.+)", ["It was {0}.", "He spake unto {1}.", "He said, {2}"]),
        (
            r"The sons of \w+: (\w+), and (\w+), and (\w+)\.",
            ["The first son is {0}.", "The second son is {1}.", "The last son is {2}."],
        ),
        (r"The words: (.+)", ["The words: {0}"]),
    ],
)
def test_answers_of_demo_data_can_be_read_off_their_sentences(sentence: str, answers: list[str]) -> None:
    parsed = [(re.fullmatch(sentence, r["input"]), r["output"]) for r in rows()]
    seen = [[a.format(*m.groups()) for a in answers].index(output) for m, output in parsed if m]
    assert set(seen) == set(range(len(answers)))  # every kind of question on this kind of sentence occurs
    assert len(seen) >= 80


def test_words_asked_for_are_one_or_two_pieces(tokenizer: Any) -> None:
    study = script("make_demo_data")
    for word in study.NAMES + study.PLACES + study.NUMBERS + study.THINGS:
        assert len(tokenizer(f" {word}")["input_ids"]) <= 2, word


def test_calibration_text_is_long_plain_prose() -> None:
    text = (ASSETS / "calibration.txt").read_text(encoding="utf-8")
    assert 130_000 <= len(text) <= 200_000
    assert text.isascii()
    assert not re.search(r"\n\n\n|[\t\r]| {2}\S.* {2}\S.* {2}", text)
    words = re.findall(r"[A-Za-z']+", text)
    assert len(words) > 25_000  # at least 32 windows of 512 tokens even at one token a word... and half as many again
    assert len(set(map(str.lower, words))) > 4_000


def test_sources_and_licences_are_named(card: str) -> None:
    assert "bible-kjv-text" in card and "public domain" in card and "Apache-2.0" in card
    table = (ASSETS / "README.md").read_text(encoding="utf-8")
    for required in ("calibration.txt", "Jargon File 4.4.7", "dict-jargon", "bible-kjv-text", "public domain"):
        assert required in table
    assert f"{len((ASSETS / 'calibration.txt').read_text()):,} characters" in table
