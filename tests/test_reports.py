"""Reports: links lead somewhere, no page names a machine, and the gallery's page follows from its scans."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

REPORTS = Path(__file__).parents[1] / "reports"
PAGES = sorted(REPORTS.rglob("*.md"))


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPORTS / "scans"))
    return importlib.import_module("make")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPORTS)))
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_gallery_names_no_folder_of_a_machine() -> None:
    files = [*REPORTS.glob("scans/*/*.json"), *REPORTS.glob("scans/*/*.csv"), *REPORTS.glob("scans/*/report.html")]
    assert len(files) == 4 * 5  # scan.json, table.json, scan.csv, blocks.csv and report.html of four models
    for path in files:
        assert not re.search(r"[\"'>\s]/(home|work|root|tmp|Users|mnt)/", path.read_text(encoding="utf-8")), path


def test_the_page_and_its_numbers_follow_from_the_scans(gallery: ModuleType, monkeypatch, tmp_path: Path) -> None:
    for path in (REPORTS / "scans").iterdir():
        if path.name not in ("README.md", "results.json"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(gallery, "HERE", tmp_path)
    gallery.main([])
    assert (tmp_path / "README.md").read_text() == (REPORTS / "scans/README.md").read_text()


def test_the_engine_study_follows_from_its_runs() -> None:
    spec = importlib.util.spec_from_file_location("engine_study", REPORTS / "studies/engine/run.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert study.page(study.load()) == (REPORTS / "studies/engine/README.md").read_text()


@pytest.mark.parametrize("n", [5, 7])
def test_correlation_is_spearmans_with_its_exact_p(gallery: ModuleType, n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = pd.Series(rng.normal(size=n)), pd.Series(rng.normal(size=n))
    rho, p, null = gallery.correlation(a, b, gallery.orders(n))
    assert rho == pytest.approx(stats.spearmanr(a, b).statistic)
    exact = stats.permutation_test(
        (a,), lambda x: stats.spearmanr(x, b).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert p == pytest.approx(exact.pvalue, abs=2e-3)
    least = gallery.least_significant(null)
    step = 12 / (n**3 - n)  # between neighbouring values of rho
    assert (np.abs(null) >= least - 1e-6).mean() < 0.05 <= (np.abs(null) >= least - step - 1e-6).mean()


def test_shares_of_role_and_block_are_those_that_were_planted(gallery: ModuleType) -> None:
    rng = np.random.default_rng(0)
    roles, blocks = np.meshgrid(np.arange(7), np.arange(40), indexing="ij")
    frame = pd.DataFrame({"role": roles.ravel().astype(str), "block": blocks.ravel()})
    by_role = gallery.explained(frame.assign(alpha=roles.ravel() + 0.1 * rng.normal(size=280)))
    assert by_role["role"] > 0.95 and abs(by_role["block"]) < 0.01 and by_role["block_p"] > 0.01
    neither = gallery.explained(frame.assign(alpha=rng.normal(size=280)))
    assert abs(neither["role"]) < 0.05 and abs(neither["block"]) < 0.1
