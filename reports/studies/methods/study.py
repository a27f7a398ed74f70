"""What a study is: the cells that a YAML file spans, the rows it trains and tests on, the tables it draws blocks by.

Everything here is a function of the YAML file and of files that it names; nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
READ_BY_SOME = ("active", "every", "rank", "always_on")  # an arm has them where `reads` names them


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: an arm at one learning rate with one seed."""

    arm: str
    method: str
    table: str | None
    lr: float
    seed: int
    settings: dict[str, Any]
    own: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm}--lr{self.lr:g}--seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A YAML file, read and checked."""

    path: Path
    spec: dict[str, Any]

    @property
    def directory(self) -> Path:
        """Where results, plots and the page of this study lie: a folder beside the YAML file, with its name."""
        return self.path.with_suffix("")

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return tuple(float(lr) for lr in self.spec["learning_rates"])

    @property
    def arms(self) -> dict[str, Row]:
        return self.spec["arms"]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        return tuple(self.arms[arm].get("seeds", self.spec["seeds"]))

    @property
    def tuning_seed(self) -> int:
        """The seed of the sweep; runs that are reported have others."""
        return int(self.spec["tuning_seed"])

    def sweep(self) -> list[Cell]:
        """Every arm at every learning rate with the tuning seed."""
        rates = {arm: spec.get("learning_rates", self.learning_rates) for arm, spec in self.arms.items()}
        return self._ordered([self._cell(arm, lr, self.tuning_seed) for arm in self.arms for lr in rates[arm]])

    def reported(self, chosen: Mapping[str, float]) -> list[Cell]:
        """The arms of `chosen` at their learning rates with each of the study's seeds."""
        made = [self._cell(arm, chosen[arm], seed) for arm in self.arms if arm in chosen for seed in self.seeds_of(arm)]
        return self._ordered(made)

    def _ordered(self, cells: list[Cell]) -> list[Cell]:
        """Stage by stage, then seed by seed, so that a matrix cut short still gives each arm the same."""
        return sorted(cells, key=lambda cell: (self.arms[cell.arm].get("stage", 1), cell.seed))

    @property
    def num_cells(self) -> int:
        """Of the whole study."""
        return len(self.sweep()) + sum(len(self.seeds_of(arm)) for arm in self.arms)

    def _cell(self, arm: str, lr: float, seed: int) -> Cell:
        spec = self.arms[arm]
        settings = {**self.spec["settings"], **spec.get("settings", {})}
        sampled = {key: settings.pop(key, None) for key in READ_BY_SOME}
        kept = {key: sampled[key] for key in spec.get("reads", ()) if sampled[key] is not None}
        return Cell(
            arm=arm,
            method=spec["method"],
            table=spec.get("table"),
            lr=float(lr),
            seed=int(seed),
            settings=settings | kept,
            own=dict(spec.get("set", {})),
        )


def read_study(path: str | Path) -> Study:
    """The study of a YAML file.

    Raises: SystemExit that names what is missing or not understood.
    """
    path = Path(path)
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    needed = {"model", "data", "settings", "learning_rates", "tuning_seed", "seeds", "arms", "reference"}
    known = needed | {"title", "threads", "tasks", "questions", "note", "machine"}
    if missing := needed - set(spec):
        raise SystemExit(f"{path}: {', '.join(sorted(missing))} missing")
    if unknown := set(spec) - known:
        raise SystemExit(f"{path}: got {', '.join(sorted(unknown))}, known: {', '.join(sorted(known))}")
    for name, arm in spec["arms"].items():
        if extra := set(arm) - {
            "method",
            "table",
            "reads",
            "set",
            "settings",
            "seeds",
            "learning_rates",
            "stage",
            "group",
        }:
            raise SystemExit(f"{path}: arm {name}: got {', '.join(sorted(extra))}")
    if spec["tuning_seed"] in spec["seeds"]:
        raise SystemExit(f"{path}: the tuning seed {spec['tuning_seed']} is among the reported seeds; give it another")
    if spec["reference"] not in spec["arms"]:
        raise SystemExit(f"{path}: the reference {spec['reference']} is not one of the arms")
    return Study(path=path, spec=spec)


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to train on, to choose learning rates by, and to report; no question of the last two is in the first."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    removed: int

    @property
    def sha256(self) -> dict[str, str]:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in parts.items()}


def divide(rows: list[Row], spec: dict[str, Any], others: Sequence[Row] = ()) -> Rows:
    """Each `held_out_every`-th row is held out, for validation and test in turn; the others train.

    With `rows` in the spec that many are taken first, shuffled by seed 0. Rows of the training part whose question
    is, up to case and punctuation, one of the held-out rows' or of `others` (test sets that will be asked) are removed.
    """
    if spec.get("shuffle"):
        rows = rows[:]
        random.Random(0).shuffle(rows)
    rows = rows[: spec.get("rows")]
    held = rows[:: spec["held_out_every"]]
    asked = {question(row) for row in (*held, *others)}
    training = [row for i, row in enumerate(rows) if i % spec["held_out_every"]]
    kept = [row for row in training if question(row) not in asked]
    made = Rows(train=kept, validation=held[::2], test=held[1::2], removed=len(training) - len(kept))
    check_no_overlap(made.train, (*made.validation, *made.test, *others))
    return made


def question(row: Row) -> str:
    """What a row asks, without case, punctuation and white space."""
    text = " ".join(str(row.get(key) or "") for key in ("instruction", "input", "prompt", "question"))
    return re.sub(r"[\W_]+", " ", text).strip().lower()


def check_no_overlap(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Raises: SystemExit when a question that will be asked is trained on."""
    seen = {question(row) for row in train}
    common = [row for row in held_out if question(row) in seen]
    if common:
        raise SystemExit(f"{len(common)} held-out rows are in the training data, the first: {question(common[0])!r}")


# -- tables ----------------------------------------------------------------------------------------------------------


def scan_tables(model: str, gamma: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layer tables of a study by name, and what a report has to know of them (scores, seconds of the scan).

    A table by alpha costs a scan without calibration, one by LOD what a whole scan costs beyond that, and the others
    nothing. Seconds are those of the processor, so that what else the machine does hardly counts.
    """
    import htsr

    started = time.process_time()
    htsr.scan(model, fresh=True, calibration=None)
    alpha_seconds = time.process_time() - started
    scan = htsr.scan(model, fresh=True)
    lod_seconds = time.process_time() - started - 2 * alpha_seconds
    rules: dict[str, dict[str, Any]] = {
        "lod": {"rule": "lod"},
        "alpha-heavy": {"rule": "alpha", "direction": "heavy"},
        "alpha-light": {"rule": "alpha", "direction": "light"},
        "reverse": {"rule": "reverse"},
        "decrease": {"rule": "decrease"},
        "uniform": {"rule": "uniform"},
    }
    tables = {name: scan.table(gamma=gamma, **rule) for name, rule in rules.items()}
    cost = {"lod": lod_seconds, "reverse": lod_seconds, "alpha-heavy": alpha_seconds, "alpha-light": alpha_seconds}
    facts = {
        name: {
            "rule": table.rule,
            "score": list(map(float, table.score)),
            "inclusion": list(map(float, table.inclusion)),
            "scan_cpu_seconds": cost.get(name, 0.0),
        }
        for name, table in tables.items()
    }
    return tables, {"gamma": gamma, "tables": facts, "model": dict(tables["lod"].model)}


def without_tables(model: str) -> dict[str, Any]:
    """What a report has to know of the model where no arm draws by a table."""
    import htsr

    return {"gamma": None, "tables": {}, "model": dict(htsr.scan(model, calibration=None).provenance["model"])}
