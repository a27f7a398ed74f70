"""The report: one page that loads nothing, escapes everything, and says what is seen."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from makers import scan_rows as rows

from htsr.plots import PICTURES, pictures
from htsr.report import CAPTIONS, cells, describe, notebook_html, report_html
from htsr.result import ScanResult

EVIL = '<script>alert("x")</script>'


@pytest.fixture
def result() -> ScanResult:
    frame = rows(
        block=[0, 1, 2, 2],
        tensor=[EVIL, "b", "c", "d"],
        alpha=[2.0, 4.0, 3.0, np.nan],
        lod=[0.3, 0.1, 0.2, np.nan],
        status=["ok", "ok", "ok", "failed"],
        reason=["", "", "", "1 of 100 entries are NaN or infinite"],
    )
    return ScanResult(frame=frame, provenance={"model": {"id": EVIL, "num_blocks": 3}, "lod_reason": "", "seconds": {}})


def test_the_page_loads_nothing_and_runs_nothing(result: ScanResult) -> None:
    page = report_html(result, pictures(result))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1) == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page)
    assert page.count("<img ") == 4  # alpha, lod, heatmap and the table; no spectra were kept


def test_names_from_a_model_are_escaped_everywhere(result: ScanResult) -> None:
    for page in (report_html(result, {}), notebook_html(result)):
        assert EVIL not in page
        assert "&lt;script&gt;" in page


def test_a_table_shows_its_rows_and_bars_in_a_notebook_and_escapes_names(result: ScanResult) -> None:
    page = result.table(rule="lod", gamma=2)._repr_html_()
    assert EVIL not in page and "&lt;script&gt;" in page
    assert page.count("<tr>") == 1 + 3
    assert 'src="data:image/png;base64,' in page and "gamma 2" in page


def test_every_picture_has_a_caption() -> None:
    assert tuple(CAPTIONS) == PICTURES


def test_a_scan_names_itself_in_one_short_line(result: ScanResult) -> None:
    assert repr(result) == f"ScanResult({EVIL!r}, 3 blocks, 3 matrices analysed)"


def test_the_words_name_what_stands_out(result: ScanResult) -> None:
    text = " ".join(describe(result))
    assert "3 matrices analysed, 1 failed" in text
    assert "lowest mean alpha (heaviest tails): 0 (2)" in text
    assert "highest outlier share (LOD): 0 (0.3)" in text
    assert "Spearman correlation of alpha and LOD over the blocks: -1.00" in text
    assert "1 of 100 entries are NaN" in report_html(result, {})


def test_a_scan_without_blocks_or_numbers_still_has_a_page() -> None:
    bare = ScanResult(frame=rows(block=[pd.NA], tensor=["a"], status=["skipped"]), provenance={"lod_reason": "no text"})
    page = report_html(bare, pictures(bare))
    assert "LOD was not computed: no text." in page
    assert "0 matrices analysed" in page
    assert notebook_html(bare).endswith("</table>")


def test_columns_are_readable_and_empty_where_nothing_is_known() -> None:
    frame = pd.DataFrame(
        {
            "n": pd.array([1234567, pd.NA], dtype="Int64"),
            "x": [12.3456789, np.nan],
            "tiny": [3e-9, 1e-9],
            "word": ["a", None],
        }
    )
    assert cells(frame) == [["n", "x", "tiny", "word"], ["1,234,567", "12.35", "3e-09", "a"], ["", "", "1e-09", ""]]
