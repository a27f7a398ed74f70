"""What `evaluate` reports is what a plain scorer finds, row by row."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import makers
import pytest
import torch
from eval_samples import best, log_likelihood, parsed, rolled, standard_error, write_data

from owlore.evaluation import evaluate
from owlore.evaluation.scorer import Scorer, Tree

PROMPTS = {
    "arc_easy": "Question: {}\nAnswer:", "arc_challenge": "Question: {}\nAnswer:", "piqa": "Question: {}\nAnswer:",
    "openbookqa": "{}", "hellaswag": "{}", "siqa": "Q: {}\nA:", "boolq": "Question: {}\nAnswer:", "winogrande": None,
}  # fmt: skip
FILES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "siqa": "social_i_qa"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    model = makers.tiny_llama(vocab=64, seed=3).eval()
    return model, makers.byte_tokenizer(64)


def by_hand(model: Any, tokenizer: Any, task: str, rows: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Hits by summed likelihood and by likelihood a character, from the plain scorer."""
    hits, normalised = [], []
    for row in rows:
        question, choices, gold = parsed(row)
        if PROMPTS[task] is None:
            before, after = question.split("_")
            pairs = [(before + choice, " " + after.strip()) for choice in choices]
        else:
            pairs = [(PROMPTS[task].format(question), " " + choice) for choice in choices]
        sums = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        hits.append(int(best(sums) == gold))
        normalised.append(int(best([s / len(c) for s, c in zip(sums, choices, strict=True)]) == gold))
    return hits, normalised


def compare(model: Any, tokenizer: Any, data: Path, tasks: list[str], limit: int | None, shuffle: int | None) -> dict:
    found = evaluate(model, tokenizer, tasks, data_dir=data, limit=limit, shuffle=shuffle, rows=True)
    for task in tasks:
        rows = json.loads((data / "commonsense" / "test" / f"{FILES.get(task, task)}.json").read_text())
        if shuffle is not None:
            random.Random(shuffle).shuffle(rows)
        hits, normalised = by_hand(model, tokenizer, task, rows[:limit])
        result = found["tasks"][task]
        assert [int(row["acc"]) for row in result["rows"]] == hits, task
        assert result["acc"] == pytest.approx(sum(hits) / len(hits))
        assert result["acc_stderr"] == pytest.approx(standard_error(hits))
        assert result["n"] == len(hits)
        if "acc_norm" in result:
            assert [int(row["acc_norm"]) for row in result["rows"]] == normalised, task
    return found


def test_the_eight_tasks_agree_with_a_plain_scorer_row_by_row(small: tuple[Any, Any], data: Path) -> None:
    found = compare(*small, data, list(PROMPTS), None, None)
    assert found["tasks"]["boolq"]["task"] == "boolq_nopassage"
    assert found["scoring"] == "tree"
    assert {"acc_norm" in found["tasks"][task] for task in ("boolq", "winogrande")} == {False}


def test_the_eight_tasks_agree_on_stories260k(stories: Path, shared: Path) -> None:
    model, tokenizer = load(stories)
    compare(model, tokenizer, shared / "data", list(PROMPTS), 5, 0)


@pytest.mark.slow
def test_the_eight_tasks_agree_on_smollm2(shared: Path) -> None:
    model, tokenizer = load(smollm2(shared))
    found = compare(model, tokenizer, shared / "data", list(PROMPTS), 8, 0)
    assert all(result["n"] == 8 for result in found["tasks"].values())


def smollm2(shared: Path) -> Path:
    place = shared.resolve().parent / "models" / "smollm2"
    if not place.is_dir():
        pytest.skip("no models/smollm2: make it with reports/studies/first-road/fetch_smollm2.py")
    return place


def load(place: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(place)


def test_perplexity_agrees_with_a_plain_scorer(small: tuple[Any, Any], data: Path) -> None:
    pages = compare_perplexity(*small, data, None)
    assert [page.split("=")[1].strip() for page in pages] == ["The sea", "A hat"]


def test_perplexity_agrees_on_stories260k(stories: Path, shared: Path) -> None:
    assert len(compare_perplexity(*load(stories), shared / "data", 1)) == 1


@pytest.mark.slow
def test_perplexity_agrees_on_smollm2(shared: Path) -> None:
    assert len(compare_perplexity(*load(smollm2(shared)), shared / "data", 2)) == 2


def compare_perplexity(model: Any, tokenizer: Any, data: Path, limit: int | None) -> list[str]:
    """The articles that were measured."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from owlore.evaluation.sources import articles

    pages = articles((data / "text" / "wikitext-2" / "test.txt").read_text())[:limit]
    result = evaluate(model, tokenizer, ["wikitext"], data_dir=data, limit=limit)["tasks"]["wikitext"]
    total = words = size = tokens = 0.0
    for page in pages:
        ids = tokenizer(wikitext_detokenizer({"page": page}))["input_ids"]  # a first <s> counts, as in the harness
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        total += rolled(model, ids, first, result["window"])
        words += len(re.split(r"\s+", page))  # as the harness counts, empty words at both ends included
        size += len(page.encode())
        tokens += len(ids)
    assert result["word_perplexity"] == pytest.approx(2.718281828459045 ** (-total / words), rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(2.718281828459045 ** (-total / size), rel=1e-5)
    assert result["perplexity"] == pytest.approx(2.718281828459045 ** (-total / tokens), rel=1e-5)
    return pages


def test_windows_of_a_long_text_predict_each_token_once(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    scorer = Scorer(model, tokenizer, max_length=16)
    text = "the sea is wet and it is wide, and a hat is worn on the head."
    request = type("Request", (), {"args": (text,)})()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) % 16, "the last window is a shorter one"
    assert scorer.loglikelihood_rolling([request]) == pytest.approx([rolled(model, ids, 1, 16)], rel=1e-5)


def test_likelihoods_are_those_of_the_harness_own_model(small: tuple[Any, Any]) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model needs it")
    from lm_eval.models.huggingface import HFLM

    from htsr.console import quiet_libraries

    model, tokenizer = small
    with quiet_libraries(prints=True):
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=24)
        ours = Scorer(model, tokenizer, max_length=24)
        pairs = [("the sea is", " wet"), ("the sea is", " wide and wet"), ("a hat", " is worn"), ("", "the sun is red"),
                 ("the sea is wet and it is wide", " and the hat is red")]  # fmt: skip
        asked = [type("Request", (), {"args": pair})() for pair in pairs]
        whole = [type("Request", (), {"args": (" ".join(a + b for a, b in pairs),)})()]
        found = [(lm.loglikelihood(asked), lm.loglikelihood_rolling(whole)) for lm in (ours, theirs)]
    assert [s for s, _ in found[0][0]] == pytest.approx([s for s, _ in found[1][0]], rel=1e-5)
    assert [greedy for _, greedy in found[0][0]] == [greedy for _, greedy in found[1][0]]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("family", makers.FAMILIES)
def test_a_tree_scores_as_each_sequence_alone(family: str) -> None:
    model = makers.tiny_models()[family](seed=1)
    tokenizer = makers.byte_tokenizer(64)
    scorer = Scorer(model, tokenizer, budget=40)
    contexts = ["a hat", "a hat is", "the sea is wet"]
    pairs = [(context, said) for context in contexts for said in (" and", " and it", " so")]
    requests = [(pair, tokenizer(pair[0])["input_ids"], tokenizer(pair[1])["input_ids"]) for pair in pairs]
    found = scorer._loglikelihood_tokens(requests)
    expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_most_families_are_scored_as_trees() -> None:
    tokenizer = makers.byte_tokenizer(64)
    taken = {name: Scorer(makers.tiny_models()[name](seed=1), tokenizer).takes_trees for name in makers.FAMILIES}
    assert {"llama", "llama-tied", "qwen2", "qwen3", "gemma", "gpt2"} <= {name for name, one in taken.items() if one}


def test_a_tree_holds_each_shared_token_once_and_sees_ancestors_alone() -> None:
    tree = Tree()
    for sequence in ((5, 6, 7), (5, 6, 8), (5, 9)):
        assert tree.new_nodes(sequence) == (3 if not tree.tokens else 1)
        tree.add(sequence)
    assert tree.tokens == [5, 6, 7, 8, 9]
    assert tree.depths == [0, 1, 2, 2, 1]
    assert tree.attended().astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1],
    ]  # fmt: skip


def test_padded_batches_give_the_same_scores(small: tuple[Any, Any], data: Path, monkeypatch: Any) -> None:
    as_trees = evaluate(*small, ["arc_easy", "winogrande"], data_dir=data, rows=True)
    monkeypatch.setattr(Scorer, "_takes_trees", lambda self: False)
    padded = evaluate(*small, ["arc_easy", "winogrande"], data_dir=data, rows=True, budget=100)
    assert (as_trees["scoring"], padded["scoring"]) == ("tree", "padded batches")
    for task in ("arc_easy", "winogrande"):
        assert as_trees["tasks"][task]["rows"] == padded["tasks"][task]["rows"]


def test_a_long_context_is_cut_on_the_left(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    scorer = Scorer(model, tokenizer, max_length=10)
    context, said = "the sea is wet and wide", " and"
    ids = [tokenizer(context)["input_ids"], tokenizer(said)["input_ids"]]
    ((score, _),) = scorer._loglikelihood_tokens([((context, said), *ids)])
    assert score == pytest.approx(log_likelihood(model, tokenizer, context[-7:], said), rel=1e-5)
