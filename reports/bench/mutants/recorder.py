"""Runs the tests of the current directory, writes down which of them runs which line; `mutants.py cover` starts it.

python recorder.py FILE.json TESTS...

What a fixture shared by several tests runs counts for all of them, not for the one that came first. Lines that run only
in child processes are not seen, nor those that run only when a module is imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import coverage
import pytest


def options() -> list[str]:
    """One process, the same random examples every time, no memory of earlier runs."""
    own = {"xdist": ["-n", "0"], "hypothesis": ["--hypothesis-seed=0"]}
    known = [option for name, words in own.items() if importlib.util.find_spec(name) for option in words]
    return ["-p", "no:cacheprovider", *known]


class Recorder:
    """A pytest plugin: a coverage context for every test and for every fixture that several tests share.

    Every 50 tests it saves what it has, and tests that an earlier, broken-off run has saved are not run again.
    """

    def __init__(self, measure: coverage.Coverage, state: Path) -> None:
        self.measure, self.state, self.where, self.shared_now, self.unsaved = measure, state, "", 0.0, 0
        saved = json.loads(state.read_text()) if state.exists() else {}
        self.seconds: Counter[str] = Counter(saved.get("seconds", {}))
        self.fixtures: dict[str, list[str]] = saved.get("fixtures", {})
        self.failed: set[str] = set(saved.get("failed", []))
        self.users: dict[str, list[str]] = {}

    def save(self) -> None:
        """Coverage first: a test that the state names has its lines."""
        self.measure.save()
        state = {"seconds": self.seconds, "fixtures": self.fixtures, "failed": sorted(self.failed)}
        self.state.write_text(json.dumps(state))
        self.unsaved = 0

    def _switch(self, where: str) -> str:
        before, self.where = self.where, where
        self.measure.switch_context(where)
        return before

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.shared_now = 0.0
        self._switch(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._switch("")
        self.fixtures[nodeid] = self.users[nodeid]
        self.unsaved += 1
        if self.unsaved == 50:
            self.save()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.fixtures]
        for item in items:
            found = [d for ds in item._fixtureinfo.name2fixturedefs.values() for d in ds]
            self.users[item.nodeid] = sorted({self._name(d) for d in found if d.scope != "function"})

    @staticmethod
    def _name(definition: Any) -> str:
        return f"fixture {definition.baseid} {definition.argname}"

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        before, began, inner = self._switch(self._name(fixturedef)), time.monotonic(), self.shared_now
        try:
            return (yield)
        finally:
            own = time.monotonic() - began - (self.shared_now - inner)
            self.seconds[self.where] += own
            self.shared_now += own
            self._switch(before)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration - (self.shared_now if report.when == "setup" else 0.0)
        if report.outcome != "passed":
            self.failed.add(report.nodeid)


def record(out: Path, tests: list[str]) -> None:
    """Runs the tests in this process, in the current directory, and writes line -> tests and seconds to `out`."""
    state = out.with_name("tests.json")
    measure = coverage.Coverage(data_file=out.with_name("lines.sqlite"), source=["htsr", "owlore"], config_file=False)
    measure.load()
    plugin = Recorder(measure, state)
    measure.start()
    warning = "ignore::coverage.exceptions.CoverageWarning"
    code = pytest.main([*options(), "-W", warning, *tests], plugins=[plugin])
    measure.stop()
    plugin.save()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(code)
    good = [t for t in plugin.fixtures if t not in plugin.failed]
    users = {t: [i] for i, t in enumerate(good)}
    for i, test in enumerate(good):
        for name in plugin.fixtures[test]:
            users.setdefault(name, []).append(i)
    cost = [round(plugin.seconds[t] + sum(plugin.seconds[f] for f in plugin.fixtures[t]), 3) for t in good]
    data, lines = measure.get_data(), {}
    for path in data.measured_files():
        by_line = {n: sorted({i for c in names for i in users.get(c, [])})
                   for n, names in data.contexts_by_lineno(path).items()}  # fmt: skip
        lines[str(Path(path).relative_to(Path.cwd()))] = {n: tests for n, tests in by_line.items() if tests}
    failed = sorted(plugin.failed)
    out.write_text(json.dumps({"tests": good, "seconds": cost, "not used": failed, "lines": lines}))
    print(f"{len(good)} tests, {len(failed)} failed or skipped and are not used, {sum(cost):.0f} s")


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2:])
