"""The layer table: how often each block is to be trained, checked when it is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsr.errors import BadInput, UsageError
from htsr.files import read_json, write_text
from htsr.probability import Floats, inclusion, probabilities, shortfall

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "htsr-layer-table/1"
COLUMNS = ("index", "score", "probability", "inclusion")
SUM_TOLERANCE = 1e-6  # a table written by hand with seven digits is still one


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTable:
    """How often each block is to be trained, and what that was computed from.

    Attributes:
        model: `id`, `revision`, `num_blocks`, `config_sha256`, `weights_sha256` of the scanned model.
        rule: `name` of the rule and its settings (temperature, floor, direction, tau ...); `note` when the user has to
            know something about the table.
        gamma: number of blocks in a draw, from 1 to L.
        index: the numbers 0 to L - 1 of the blocks, shape (L,).
        score: the rule's score of each block, at least 0, shape (L,).
        probability: share of each block in the scores, in [0, 1], summing to 1, shape (L,).
        inclusion: chance that a draw of gamma different blocks holds each block, in [0, 1], summing to gamma, shape
            (L,).
    """

    model: dict[str, Any]
    rule: dict[str, Any]
    gamma: int
    index: NDArray[np.int64]
    score: Floats
    probability: Floats
    inclusion: Floats

    @classmethod
    def build(
        cls,
        scores: ArrayLike,
        gamma: int = 5,
        temperature: float = 1.0,
        floor: float = 0.0,
        *,
        rule: Mapping[str, Any] | str = "given",
        model: Mapping[str, Any] | None = None,
    ) -> LayerTable:
        """Make the table of given scores.

        Args:
            scores: one number a block, at least 0, shape (L,).
            gamma: number of blocks in a draw, at least 1; it is cut to L.
            temperature: the probabilities follow score^(1/temperature); above 0.
            floor: lower bound on every inclusion, from 0 to gamma / L.
            rule: the name of the rule that made the scores, or its name and settings; temperature and floor are added.
            model: identity of the scanned model, as in `Attributes`.

        Returns:
            The table, in the order of the scores.

        Raises:
            UsageError: gamma, temperature or floor is out of range.
            BadInput: the scores are empty, negative or not finite.
        """
        values = np.asarray(scores, dtype=np.float64)
        probability = probabilities(values, temperature)
        gamma = min(_whole_gamma(gamma), len(values))
        described = {"name": rule} if isinstance(rule, str) else dict(rule)
        described |= {"temperature": float(temperature), "floor": float(floor)}
        if note := shortfall(probability, gamma, floor):
            described["note"] = note
        identity = dict.fromkeys(("id", "revision", "num_blocks", "config_sha256", "weights_sha256"))
        return cls(
            model=identity | dict(model or {}) | {"num_blocks": len(values)},
            rule=described,
            gamma=gamma,
            index=np.arange(len(values)),
            score=values,
            probability=probability,
            inclusion=inclusion(probability, gamma, floor),
        )

    @classmethod
    def uniform(cls, num_blocks: int, gamma: int = 5) -> LayerTable:
        """Make the table in which every block is alike, as LISA and BAdam draw.

        Args:
            num_blocks: number of blocks of the model, at least 1.
            gamma: number of blocks in a draw.
        """
        return cls.build(np.ones(num_blocks), gamma, rule="uniform")

    @classmethod
    def load(cls, path: str | Path) -> LayerTable:
        """Read and check a table.

        Args:
            path: a table file, or a scan directory with a `table.json`.

        Raises:
            NotFound: there is no such file.
            BadInput: the file is no table of this schema, or its numbers contradict each other.
        """
        path = Path(path)
        path = path / "table.json" if path.is_dir() else path
        data = read_json(path, expected=f"a layer table ({SCHEMA})")
        try:
            return cls.from_dict(data)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> LayerTable:
        """Check a table that was read already.

        Args:
            data: the parsed JSON value.

        Raises:
            BadInput: as `load` does.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise BadInput(f"got schema {got!r}, expected {SCHEMA!r}; make a table with `htsr table`")
        model, rule, gamma, rows = (data.get(key) for key in ("model", "rule", "gamma", "blocks"))
        if not isinstance(model, dict) or not isinstance(rule, dict):
            raise BadInput("got no `model` or no `rule` object, expected both; make a table with `htsr table`")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise BadInput("`blocks`: expected a list with one object a block")
        depth, columns = len(rows), {name: _numbers(rows, name) for name in COLUMNS}
        order = _check_blocks(columns.pop("index"), model.get("num_blocks"))
        if isinstance(gamma, bool) or not isinstance(gamma, int) or not 1 <= gamma <= depth:
            raise BadInput(f"`gamma`: got {gamma!r}, expected a whole number from 1 to {depth}, the number of blocks")
        _check_sum("probability", columns["probability"][order], 1.0)
        _check_sum("inclusion", columns["inclusion"][order], float(gamma))
        ordered = {name: column[order] for name, column in columns.items()}
        return cls(model=model, rule=rule, gamma=gamma, index=np.arange(depth), **ordered)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.index)

    @property
    def note(self) -> str:
        """What a user has to know about this table, such as fewer positive scores than gamma; else ''."""
        return str(self.rule.get("note", ""))

    @property
    def frame(self) -> pd.DataFrame:
        """One row a block: index, score, probability, inclusion."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in COLUMNS})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, numbers as plain ints and floats."""
        columns = [getattr(self, name).tolist() for name in COLUMNS]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "rule": self.rule,
            "gamma": self.gamma,
            "blocks": [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)],
        }

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON; a reader sees the old file or the new one, and floats keep full precision.

        Args:
            path: the file to write; its directory is made when it does not exist.

        Returns:
            The path.
        """
        import json

        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(path)

    def _repr_html_(self) -> str:
        from htsr.report import table_html

        return table_html(self)


def _whole_gamma(gamma: float) -> int:
    if not math.isfinite(gamma) or gamma != int(gamma) or gamma < 1:
        raise UsageError(f"gamma: got {gamma}, expected a whole number of blocks, at least 1")
    return int(gamma)


def _numbers(rows: list[dict[str, Any]], name: str) -> Floats:
    values = [row.get(name) for row in rows]
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
            raise BadInput(f"`blocks[{position}].{name}`: got {value!r}, expected a finite number of at least 0")
    return np.asarray(values, dtype=np.float64)


def _check_blocks(index: Floats, num_blocks: Any) -> NDArray[np.int64]:
    """The order that sorts `index`, once it is known to hold 0 .. num_blocks - 1 exactly once."""
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
        raise BadInput(f"`model.num_blocks`: got {num_blocks!r}, expected the number of blocks")
    counts = Counter(index.tolist())
    if twice := [value for value, count in counts.items() if count > 1]:
        raise BadInput(f"block {twice[0]:g} is listed {counts[twice[0]]} times, expected every block exactly once")
    if strange := [value for value in counts if value != int(value) or value >= num_blocks]:
        raise BadInput(f"block {strange[0]:g} is listed, expected indexes 0 to {num_blocks - 1} (num_blocks)")
    if len(counts) != num_blocks:
        missing = next(block for block in range(num_blocks) if block not in counts)
        raise BadInput(f"block {missing} is missing, expected every block 0 to {num_blocks - 1} exactly once")
    return np.argsort(index)


def _check_sum(name: str, values: Floats, expected: float) -> None:
    if (values > 1 + SUM_TOLERANCE).any():
        block = int(np.argmax(values))
        raise BadInput(f"{name} of block {block} is {values[block]:g}, expected at most 1")
    total = math.fsum(values)
    if abs(total - expected) > SUM_TOLERANCE * max(1.0, expected):
        raise BadInput(f"{name} sums to {total:.9g}, expected {expected:g}; make the table again with `htsr table`")
