"""The GPU bench without a GPU: the same command runs a small shape on the CPU, in parts, correctness first."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "reports/bench/gpu"
MODULES = ("bench", "rows", "shapes", "ours", "peers", "measure", "timeline")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("bench")
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_command_runs_on_the_cpu_in_parts_and_compares_gradients_first(bench, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--rows", "host+nf4", "--here"]
    assert bench.main([*arguments, "--minutes", "0"]) == 0
    assert "0 of 3 rows are done" in capsys.readouterr().out
    assert bench.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["agree", "small host+nf4", "small host+nf4+offload"]
    assert rows["agree"]["gradients_compared"] > 100
    measured = rows["small host+nf4"]
    assert measured["tokens_per_s"] > 0 and measured["steps"] == 4
    assert measured["block_bytes"]["resident"] == 0 and measured["block_bytes"]["drawn"] > 0
    # Draws change in between, so that loads are those of several sets; none may be above a load a visit.
    assert 0 < measured["loads"] <= 2 * 12
    assert measured["planned_bytes"]["total"] > 0 and "timeline" not in measured
    pictures = sorted(path.name for path in (tmp_path / "timelines").iterdir())
    assert pictures == ["small-host+nf4+offload.png", "small-host+nf4.png"]
    assert "| small host+nf4 |" in (tmp_path / "table.md").read_text()
    before = (tmp_path / "results.json").read_bytes()
    assert bench.main(arguments) == 0  # nothing is done twice
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_copy_has_the_direction_of_the_visit_it_is_for(bench):
    directed = importlib.import_module("timeline").directed
    spans = [["copy", 0, 0, 1], ["visit", 0, 1, 2], ["copy", 1, 1, 2], ["visit", 1, 2, 3], ["unload", 1, 2, 3],
             ["loss", None, 3, 4], ["visit", 1, 4, 5], ["copy", 0, 4, 5], ["stall", 0, 5, 6], ["visit", 0, 6, 7],
             ["copy", 1, 6, 7]]  # fmt: skip
    assert [direction for _, direction, *_ in directed(spans)] == [
        "forward", "forward", "forward", "forward", "forward", "", "backward", "backward", "backward", "backward",
        "forward",
    ]  # fmt: skip


def test_nothing_is_measured_when_gradients_disagree(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench, "in_own_process", lambda row, seconds, spare: {"failed": "AssertionError: losses differ"}
    )
    assert bench.main(["--out", str(tmp_path), "--rows", "host"]) == 1
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == ["agree"]


def test_a_row_that_does_not_end_in_time_is_tried_in_a_part_of_its_own_and_then_skipped(bench, tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 1.0, 1.0, 500.0, 600.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    results = iter([{"gradients_compared": 1}, None])
    monkeypatch.setattr(bench, "in_own_process", lambda row, seconds, spare: next(results))
    bench.main(["--out", str(tmp_path), "--rows", "small host+half"])
    row = json.loads((tmp_path / "results.json").read_text())["rows"]["small host+half"]
    assert "more than 9 minutes" in row["skipped"]


def test_every_row_that_the_issue_asks_for_is_there(bench):
    rows = importlib.import_module("rows")
    names = {row.name: row for row in rows.gpu_rows()}
    assert len(names) == len(rows.gpu_rows()) and next(iter(names)) == "agree"
    assert {row.shape for row in names.values()} == {"llama-2-7b", "llama-3-8b", "mistral-7b", "llama-70b"}
    assert {row.peer for row in names.values()} == {"", "lora-16", "lisa", "galore", "full"}
    wanted = {row.name: row.wanted_gib for row in names.values() if row.wanted_gib}
    assert sorted(wanted.values()) == [4.0, 4.0, 6.3, 8.5, 12.0, 17.0, 19.0]
    for load, tokens in (("1x512", 512), ("16x512", 8192), ("4x2048", 8192)):
        of_load = [row for name, row in names.items() if f"7b {load}" in name]
        assert {row.placement for row in of_load if row.kind == "ours"} == set(rows.PLACEMENTS.values())
        assert {row.batch * row.accum * row.tokens for row in of_load} == {tokens}
