"""The study harness: what is ranked, how it is compared, and that a page follows from stored results alone."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

HARNESS = Path(__file__).parents[1] / "reports" / "studies" / "methods"
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def harness() -> Any:
    """The modules of the harness, which are scripts beside the packages."""
    sys.path.insert(0, str(HARNESS))
    try:
        names = ("study", "analyse", "report", "run")
        yield type("Harness", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(HARNESS))


def result(arm: str, lr: float, seed: int, *, loss: float, validation: float | None = None, **more: Any) -> dict:
    """A stored result with these losses."""
    return {
        "cell": f"{arm}--lr{lr:g}--seed{seed}", "arm": arm, "method": "owlore", "lr": lr, "seed": seed, "table": None,
        "status": "finished", "validation_loss": {"before": 3.0, "after": loss if validation is None else validation},
        "test_loss": loss, "exact": 0.5, "test_rows": [[loss, 1]], "curve": [[1, 3.0], [2, loss]], "draws": [1, 1],
        "tokens": 100, "steps": 2, "trainable": 0.25, "update_norms": [0.1, 0.2], "rows_sha256": {"train": "a"},
        "seconds": {"call_cpu": 10.0, "scan_cpu": 2.0}, "peak_bytes": {"resident_above_start": 1e6, "state": 2e6},
        "versions": {"torch": "t", "transformers": "t"}, "commit": "c", **more,
    }  # fmt: skip


def sweep(arm: str, losses: dict[float, list[float]]) -> list[dict]:
    """Results of an arm by learning rate; the first of each list has the tuning seed 0."""
    return [result(arm, lr, seed, loss=loss) for lr, values in losses.items() for seed, loss in enumerate(values)]


def test_the_learning_rate_is_chosen_by_validation_with_the_tuning_seed_alone(harness: Any) -> None:
    results = [result("a", 1e-3, s, loss=0.1, validation=0.1 if s else 0.9) for s in range(4)]
    results += [result("a", 1e-2, s, loss=0.5, validation=0.8 if s else 0.2) for s in range(4)]
    ((arm,), _) = harness.analyse.rank(results, RATES, 0)
    assert (arm.lr, arm.mean("test_loss")) == (1e-2, pytest.approx(0.5))
    assert list(arm.runs) == [1, 2, 3], "the run that chose is not reported"
    assert arm.at_edge


def test_an_arm_with_fewer_learning_rates_or_seeds_is_not_ranked(harness: Any) -> None:
    results = sweep("whole", {1e-3: [0.5], 1e-2: [0.4, 0.4, 0.4, 0.4]})
    results += sweep("one rate", {1e-2: [0.1, 0.1, 0.1, 0.1]})
    results += sweep("two seeds", {1e-3: [0.3, 0.1, 0.1, 0.1], 1e-2: [0.1, 0.1, 0.1]})
    arms, left_out = harness.analyse.rank(results, RATES, 0)
    assert [arm.name for arm in arms] == ["whole"]
    assert left_out == {
        "one rate": "no run at learning rate 0.001", "two seeds": "2 seeds at its learning rate, 3 are needed",
    }  # fmt: skip


def test_a_failed_run_is_an_infinite_loss_in_the_sweep_and_is_not_averaged_away_later(harness: Any) -> None:
    failed = {"status": "failed", "error": "NotFinite: loss"}
    results = sweep("a", {1e-3: [0.5, 0.5, 0.5, 0.5], 1e-2: [0.4]})
    results[-1] |= failed
    ((arm,), _) = harness.analyse.rank(results, RATES, 0)
    assert arm.lr == 1e-3
    assert math.isinf(arm.validation[1e-2])
    results[2] |= failed
    assert harness.analyse.rank(results, RATES, 0) == ([], {"a": "1 of 3 runs at its learning rate failed"})


def test_arms_that_saw_other_tokens_are_not_compared(harness: Any) -> None:
    results = sweep("a", {lr: [0.5] * 4 for lr in RATES})
    other = [{**one, "tokens": 99} for one in sweep("b", {lr: [0.4] * 4 for lr in RATES})]
    with pytest.raises(SystemExit, match="did not see the same tokens"):
        harness.analyse.rank(results + other, RATES, 0)


def test_differences_are_paired_by_seed_with_the_t_interval(harness: Any) -> None:
    first, second = [0.50, 0.61, 0.72, 0.55], [0.54, 0.64, 0.78, 0.58]
    results = [one for arm, losses in (("a", first), ("b", second)) for lr in RATES
               for one in sweep(arm, {lr: [0.5, *losses]})]  # fmt: skip
    arms, _ = harness.analyse.rank(results, RATES, 0)
    a, b = sorted(arms, key=lambda arm: arm.name)
    gap = harness.analyse.difference(a, b)
    known = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((known.low, known.high))
    assert (gap.verdict, harness.analyse.difference(b, a).verdict) == ("better", "worse")
    same = harness.analyse.Difference(mean=-0.1, low=-0.3, high=0.1, seeds=3)
    assert same.verdict.startswith("no difference")


def test_the_front_holds_what_nothing_beats(harness: Any) -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (2.0, 3.0), (4.0, 1.0)]
    assert harness.analyse.not_dominated(points) == [0, 1, 3, 4]


def test_an_arm_is_swept_first_and_then_run_with_the_seeds_at_its_rate(harness: Any, tmp_path: Path) -> None:
    study = harness.study.read_study(HARNESS / "demo.yaml")
    assert len(study.arms) >= 8
    assert {(cell.arm, cell.lr) for cell in study.sweep()} == {
        (a, lr) for a in study.arms for lr in study.learning_rates
    }
    for lr in study.learning_rates:
        one = result("lora", lr, study.tuning_seed, loss=abs(lr - 3e-3))
        (tmp_path / f"{one['cell']}.json").write_text(json.dumps(one))
    cells = harness.run.due(study, tmp_path)
    assert [(c.lr, c.seed) for c in cells if c.arm == "lora"] == [(3e-3, seed) for seed in study.seeds_of("lora")]
    assert {cell.seed for cell in cells if cell.arm != "lora"} == {study.tuning_seed}
    stages = [study.arms[cell.arm].get("stage", 1) for cell in cells]
    assert stages == sorted(stages)


@pytest.mark.parametrize("file", sorted(HARNESS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_is_readable_and_compares_arms_that_it_has(harness: Any, file: Path) -> None:
    from owlore.choices import METHODS

    study = harness.study.read_study(file)
    cells = study.sweep() + study.reported(dict.fromkeys(study.arms, 1e-3))
    assert len({cell.name for cell in cells}) >= study.num_cells - len(study.arms)
    assert {cell.method for cell in cells} <= set(METHODS)
    assert len(study.spec["seeds"]) >= 3
    for one in study.spec.get("questions", ()):
        assert {one[0], one[1]} <= set(study.arms)


def test_an_arm_gets_the_settings_that_it_reads(harness: Any) -> None:
    study = harness.study.read_study(HARNESS / "demo.yaml")
    by_arm = {cell.arm: cell for cell in study.sweep()}
    assert by_arm["owlore-lod"].settings | {"rank": 32, "active": 3} == by_arm["owlore-lod"].settings
    assert not {"rank", "active", "every", "always_on"} & set(by_arm["lora"].settings)
    assert by_arm["owlore-full-rank"].settings["rank"] == "full"


def test_no_question_that_is_asked_is_trained_on(harness: Any) -> None:
    rows = [{"instruction": f"Question {i}?", "output": "x"} for i in range(20)]
    rows[7] = {"instruction": "question  5 ", "output": "y"}  # rows 0, 5, 10, 15 are held out
    test_set = [{"instruction": "Question 11"}]
    made = harness.study.divide(rows, {"held_out_every": 5}, test_set)
    asked = {harness.study.question(row) for row in (*made.validation, *made.test, *test_set)}
    assert not asked & {harness.study.question(row) for row in made.train}
    assert (len(made.train), made.removed) == (14, 2)
    assert [len(made.validation), len(made.test)] == [2, 2]
    with pytest.raises(SystemExit, match="held-out rows are in the training data"):
        harness.study.check_no_overlap(rows, test_set)


def test_a_page_follows_from_stored_results_in_another_process_without_the_packages(
    tmp_path: Path, harness: Any
) -> None:
    for script in HARNESS.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copy(HARNESS / "demo.yaml", tmp_path / "demo.yaml")
    results = tmp_path / "demo" / "results"
    results.mkdir(parents=True)
    rates = harness.study.read_study(HARNESS / "demo.yaml").learning_rates
    for arm, loss in {"owlore-lod": 0.5, "owlore-uniform": 0.6, "lora": 0.4}.items():
        for one in sweep(arm, {lr: [loss + (s > 0) * 0.01 * (s - 1) ** 2 for s in range(4)] for lr in rates}):
            (results / f"{one['cell']}.json").write_text(json.dumps(one))
    tables = {
        name: {"inclusion": [1.0, 2.0], "scan_cpu_seconds": 1.0} for name in ("lod", "alpha-heavy", "alpha-light")
    }
    rows = {"train": 1, "validation": 1, "test": 1, "removed_as_asked_later": 0}
    (tmp_path / "demo" / "tables").mkdir()
    facts = {"tables": tables, "rows": rows, "model": {"num_blocks": 2}}
    (tmp_path / "demo" / "tables" / "scan.json").write_text(json.dumps(facts))
    code = (
        "import sys; sys.argv = ['report.py', 'demo.yaml']; sys.path.insert(0, '.'); import report; report.main(); "
        "assert not {'torch', 'owlore', 'htsr', 'transformers'} & set(sys.modules)"
    )
    pages = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
        pages.append((tmp_path / "demo" / "README.md").read_bytes() + (tmp_path / "demo" / "table.csv").read_bytes())
    assert pages[0] == pages[1]
    page = pages[0].decode()
    assert f"| lora | {rates[0]:g}* | 0.4167 ± 0.0208 | -0.1000 [-0.1000, -0.1000] |" in page
    assert "- badam: not run" in page
    assert "**better**" in page
