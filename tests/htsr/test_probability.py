"""Scores, probabilities, inclusions and the table file, against the published LLaMA-2-7B table and planted cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import paper
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import BadInput, NotFound, UsageError
from htsr.layer_table import SCHEMA, LayerTable
from htsr.probability import RULES, inclusion, probabilities, scores_by_rule, shortfall

GOLDEN = np.array(paper.LLAMA2_7B_LOD_TAU13)


def test_golden_table_has_the_published_sum_and_shares() -> None:
    shares = probabilities(GOLDEN)
    assert GOLDEN.sum() == pytest.approx(2.1856792, abs=1e-7)
    assert GOLDEN.max() / GOLDEN.min() == pytest.approx(16.24, abs=5e-3)
    assert np.round(shares[[0, 1, 27, 31]], 4).tolist() == [0.1225, 0.1351, 0.0083, 0.0377]


@pytest.mark.parametrize(
    ("gamma", "targets"),
    [
        (5, {0: 0.6126, 1: 0.6755, 2: 0.2915, 27: 0.0416, 31: 0.1886}),
        (8, {0: 0.9917, 1: 1.0, 2: 0.4719, 27: 0.0673, 31: 0.3053}),
        (10, {0: 1.0, 1: 1.0}),
    ],
)
def test_inclusion_of_the_golden_table(gamma: int, targets: dict[int, float]) -> None:
    pi = inclusion(GOLDEN, gamma)
    assert {block: round(float(pi[block]), 4) for block in targets} == targets
    assert math.fsum(pi) == pytest.approx(gamma, abs=1e-12)
    if gamma == 10:
        assert (pi >= 1).sum() == 2


def test_inclusion_is_proportional_to_the_score_wherever_nothing_caps_it() -> None:
    pi = inclusion(GOLDEN, 8)
    ratios = pi[pi < 1] / GOLDEN[pi < 1]
    assert np.ptp(ratios) <= 1e-12 * ratios.max()


scores_lists = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(scores_lists, st.integers(1, 45), st.floats(0, 1))
def test_inclusion_meets_its_definition_for_any_scores(scores: list[float], gamma: int, part: float) -> None:
    depth, target = len(scores), min(gamma, len(scores))
    floor = part * target / depth
    pi = inclusion(scores, gamma, floor)
    assert math.fsum(pi) == pytest.approx(target, abs=1e-9)
    assert (pi <= 1).all()
    assert (pi >= floor - 1e-12).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(pi[order]) >= -1e-12).all()  # a larger score never trains less often
    assert np.allclose(inclusion(1000 * np.array(scores), gamma, floor), pi, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(scores_lists, st.integers(1, 45), st.floats(0, 0.999))
def test_inclusion_equals_a_bisection_on_the_water_level(scores: list[float], gamma: int, part: float) -> None:
    depth, target = len(scores), min(gamma, len(scores))
    floor = part * target / depth
    if sum(s > 0 for s in scores) + floor * sum(s == 0 for s in scores) <= target:
        return  # no level reaches gamma: the rule for zero blocks has its own test
    assert np.allclose(inclusion(scores, gamma, floor), paper.water_filling(scores, target, floor), atol=1e-9)


def test_zero_blocks_share_equally_what_is_missing_and_it_is_said() -> None:
    pi = inclusion([2.0, 0, 1.0, 0, 0], 3)
    assert pi.tolist() == pytest.approx([1, 1 / 3, 1, 1 / 3, 1 / 3])
    assert "only 2 of 5 blocks" in shortfall([2.0, 0, 1.0, 0, 0], 3)
    assert shortfall([2.0, 0, 1.0, 0, 0], 2) == ""
    assert inclusion([2.0, 0, 1.0, 0, 0], 2).tolist() == [1, 0, 1, 0, 0]
    assert inclusion(np.zeros(4), 2).tolist() == [0.5] * 4
    assert "only 2 of 5" in LayerTable.build([2.0, 0, 1.0, 0, 0], 3).note


def test_gamma_beyond_the_depth_means_every_block() -> None:
    table = LayerTable.build([1.0, 2.0, 3.0], gamma=8)
    assert table.gamma == 3
    assert table.inclusion.tolist() == [1, 1, 1]


def test_temperature_flattens_and_sharpens() -> None:
    scores = [1.0, 4.0]
    assert probabilities(scores, 1).tolist() == pytest.approx([0.2, 0.8])
    assert probabilities(scores, 2).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert probabilities(scores, 0.5).tolist() == pytest.approx([1 / 17, 16 / 17])
    assert probabilities([1e-200, 1e200], 0.01).tolist() == [0.0, 1.0]
    assert probabilities([1.0, 10.0], 0.002).tolist() == [0.0, 1.0]  # 10^500 would be infinite
    assert probabilities([0.0, 3.0, 1.0]).tolist() == [0.0, 0.75, 0.25]  # one zero does not make all alike


def test_rules_score_the_blocks_as_documented() -> None:
    blocks = {"block": [0, 1, 2], "lod": [3.0, 1.0, 0.5], "alpha": [2.0, 4.0, 8.0], "log10_norm": [2.0, 4.0, 0.0]}
    expected = {
        "lod": [3.0, 1.0, 0.5],
        "alpha": [0.5, 0.25, 0.125],
        "uniform": [1, 1, 1],
        "decrease": [3, 2, 1],
        "increase": [1, 2, 3],
        "reverse": [0.5, 2.5, 3.0],
        "norm": [10.0, 100.0, 1.0],
    }
    for rule, scores in expected.items():
        assert scores_by_rule(rule, blocks).tolist() == pytest.approx(scores), rule
    assert scores_by_rule("alpha", blocks, "light").tolist() == [2.0, 4.0, 8.0]


def test_a_rule_that_is_only_listed_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htsr.probability.RULES", (*RULES, "new"))
    with pytest.raises(UsageError, match=r"'new'.*expected another of lod, .*reverse"):
        scores_by_rule("new", {"block": [0, 1], "lod": [1.0, 2.0]})


def test_wrong_rules_and_numbers_are_usage_errors_that_name_the_nearest() -> None:
    blocks = {"block": [0, 1], "lod": [1.0, 2.0]}
    with pytest.raises(UsageError, match="did you mean uniform"):
        scores_by_rule("uniforn", blocks)
    with pytest.raises(UsageError, match="direction"):
        scores_by_rule("lod", blocks, "light")
    for gamma in (0, -1, float("nan"), 2.5):
        with pytest.raises(UsageError, match="gamma"):
            LayerTable.build([1.0, 2.0, 3.0], gamma)
    for temperature in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="temperature"):
            probabilities([1.0], temperature)
    for floor in (-0.1, 0.9, float("nan")):
        with pytest.raises(UsageError, match="floor"):
            inclusion([1.0, 2.0, 3.0], 2, floor)


def test_a_rule_without_its_numbers_says_which_blocks_lack_them() -> None:
    with pytest.raises(BadInput, match="calibration"):
        scores_by_rule("lod", {"block": [0, 1]})
    with pytest.raises(BadInput, match="block 1"):
        scores_by_rule("alpha", {"block": [0, 1], "alpha": [2.0, float("nan")]})
    with pytest.raises(BadInput, match="no blocks"):
        scores_by_rule("uniform", {"block": []})
    for scores in ([], [1.0, float("nan")], [-1.0], [float("inf")]):
        with pytest.raises(BadInput, match="scores"):
            inclusion(scores, 1)


def test_a_saved_table_loads_to_the_same_numbers_bit_for_bit(tmp_path: Path) -> None:
    table = LayerTable.build(GOLDEN, 8, 1.3, 0.01, rule={"name": "lod", "tau": 13.0}, model={"id": "llama"})
    again = LayerTable.load(table.save(tmp_path / "deep" / "table.json"))
    assert again.to_dict() == table.to_dict()
    assert LayerTable.load(tmp_path / "deep").to_dict() == table.to_dict()  # a scan directory holds table.json
    assert again.rule == {"name": "lod", "tau": 13.0, "temperature": 1.3, "floor": 0.01}
    assert again.model["num_blocks"] == 32
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["table.json"]
    assert list(table.frame.columns) == ["index", "score", "probability", "inclusion"]


def test_uniform_table_includes_every_block_alike() -> None:
    table = LayerTable.uniform(8, 2)
    assert table.inclusion.tolist() == [0.25] * 8
    assert table.probability.tolist() == [0.125] * 8


def _spoil(change: object) -> object:
    data = json.loads(json.dumps(LayerTable.build([1.0, 2.0, 5.0, 4.0], 2).to_dict()))
    change(data)  # type: ignore[operator]
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema="htsr-layer-table/9"), SCHEMA),
        (lambda d: d.pop("schema"), SCHEMA),
        (lambda d: d.pop("rule"), "rule"),
        (lambda d: d["blocks"].pop(1), "block 1 is missing"),
        (lambda d: d["blocks"][1].update(index=0), "listed 2 times"),
        (lambda d: d["blocks"][3].update(index=7), "block 7"),
        (lambda d: d["blocks"][3].update(index=1.5), "block 1.5"),
        (lambda d: d["blocks"][0].update(probability=0.5), "probability sums to"),
        (lambda d: d["blocks"][0].update(inclusion=0.9), "inclusion sums to"),
        (lambda d: d["blocks"][0].update(inclusion=1.5), "at most 1"),
        (lambda d: d["blocks"][0].update(score=None), "score"),
        (lambda d: d["blocks"][0].update(score="1"), "score"),
        (lambda d: d["blocks"][0].update(score=-1.0), "score"),
        (lambda d: d["blocks"][0].update(score=True), "score"),
        (lambda d: d["blocks"][0].update(score=float("nan")), "score"),
        (lambda d: d.update(gamma=3), "inclusion sums to"),
        (lambda d: d.update(gamma=9), "gamma"),
        (lambda d: d.update(gamma=2.0), "gamma"),
        (lambda d: d.update(blocks=[]), "blocks"),
        (lambda d: d["model"].pop("num_blocks"), "num_blocks"),
        (lambda d: d["model"].update(num_blocks=10**9), "block 4 is missing"),
    ],
)
def test_a_wrong_table_is_bad_input_that_says_what_is_wrong(change: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        LayerTable.from_dict(_spoil(change))


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2", "[]", "null", '"x"', "[" * 5000 + "]" * 5000, '{"gamma": NaN}', '{"gamma": -Infinity}', "\xff"],
)
def test_a_file_that_is_not_a_table_is_bad_input(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match="expected"):
        LayerTable.load(path)


def test_a_missing_table_is_not_found_and_a_huge_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        LayerTable.load(tmp_path / "nothing.json")
    big = tmp_path / "big.json"
    big.write_text("[" + " " * 1_000_001 + "]")
    with pytest.raises(BadInput, match="at most 1000000"):
        LayerTable.load(big)


def test_blocks_may_be_listed_in_any_order() -> None:
    data = LayerTable.build([1.0, 2.0, 5.0], 2).to_dict()
    shuffled = {**data, "blocks": data["blocks"][::-1]}
    assert LayerTable.from_dict(shuffled).to_dict() == data


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_scores_every_block_and_makes_a_table(rule: str) -> None:
    blocks = {"block": [0, 1, 2, 3], "lod": [3.0, 1, 0.5, 2], "alpha": [2.0, 4, 8, 3], "log10_norm": [2.0, 4, 0, 1]}
    scores = scores_by_rule(rule, blocks)
    assert scores.shape == (4,) and scores.dtype == np.float64 and (scores > 0).all()
    assert inclusion(scores, 2).sum() == pytest.approx(2)
    with pytest.raises(BadInput, match="no blocks"):
        scores_by_rule(rule, {"block": []})
