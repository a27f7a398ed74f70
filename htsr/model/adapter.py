"""PEFT adapters: a LoRA directory as the differences that it makes to its base.

A LoRA of W is stored as two thin factors and means  W + s B A  with s = alpha / r (rsLoRA: alpha / sqrt(r)), where
alpha and r may differ by module. References: Hu et al. 2022 (LoRA), Kalajdzievski 2023 (rsLoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from htsr.errors import BadInput
from htsr.model.locate import read_object
from htsr.model.parts import flat_shape
from htsr.model.source import Source, TensorInfo

PREFIX = "base_model.model."  # what PEFT puts before the name of a module
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
COPIED = ".base_layer."  # PEFT also saves adapted embeddings as the base has them
COPY = "a copy of the base's own weights, beside the factors of their change"
DORA = "DoRA rescales the outputs of its base: the difference needs the base; give it with --base"
UNSUPPORTED = ("use_qalora", "use_bdlora")  # variants whose difference is not s B A


@dataclass
class LowRank:
    """The low-rank change of one module, as the adapter's file stores it.

    Attributes:
        sides: "A" and "B" -> name of the factor in the file.
        scale: the number s in s B A.
        transposed: whether the change of the stored weight is (s B A)^T, as for Conv1D and embeddings.
        magnitude: name of DoRA's vector in the file; None for a plain LoRA.
    """

    sides: dict[str, str] = field(default_factory=dict)  # "A", "B" -> tensor in the file
    scale: float = 1.0
    transposed: bool = False
    magnitude: str | None = None  # DoRA's


class AdapterSource(Source):
    """The differences that a LoRA adapter makes, under the names of the weights that it changes.

    Tensors that the adapter replaces (modules_to_save), and changes that depend on the base, are listed with a note.
    """

    is_delta, numbered, complete = True, True, False

    def __init__(self, path: Path, stored: Source, id_: str) -> None:
        self.path, self.id, self.stored = path, id_, stored
        self.settings = read_settings(path)
        self.changes: dict[str, LowRank] = {}
        self.replacements: dict[str, str] = {}  # weight of the model -> tensor of the adapter that replaces it
        for tensor in stored.tensors:
            self._add(tensor)
        infos = [self._info(name, change) for name, change in self.changes.items()]
        for name, tensor_name in self.replacements.items():
            kept = stored.info(tensor_name)
            note = COPY if COPIED in name else "stored whole: its difference needs the base; give it with --base"
            infos.append(TensorInfo(name=name, shape=kept.shape, dtype=kept.dtype, note=note))
        self.tensors = tuple(infos)

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        B, A = self.factors(name)
        return np.ascontiguousarray(B[rows[0] : rows[1]] @ A[:, cols[0] : cols[1]])

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        change = self.changes[self.info(name).name]
        B, A = (self._matrix(change.sides[side]) for side in "BA")
        B = change.scale * B
        return (np.ascontiguousarray(A.T), np.ascontiguousarray(B.T)) if change.transposed else (B, A)

    def raw(self, name: str) -> Iterator[memoryview]:
        change = self.changes.get(name)
        if change is None:
            yield from self.stored.raw(self.replacements[name])
            return
        yield memoryview(repr((change.scale, change.transposed)).encode())
        for side in sorted(change.sides):
            yield from self.stored.raw(change.sides[side])
        if change.magnitude is not None:
            yield from self.stored.raw(change.magnitude)

    def magnitude(self, name: str) -> np.ndarray | None:
        """DoRA's length of the weights of every output, float64, shape (out,); None for a plain LoRA."""
        tensor = self.changes[name].magnitude
        return None if tensor is None else self._matrix(tensor).ravel()

    def _matrix(self, tensor: str) -> np.ndarray:
        rows, cols = flat_shape(self.stored.info(tensor).shape)
        return self.stored.window(tensor, (0, rows), (0, cols)).astype(np.float64)

    def _add(self, tensor: TensorInfo) -> None:
        name = tensor.name.removeprefix(PREFIX)
        found, length = FACTOR.fullmatch(name), MAGNITUDE.fullmatch(name)
        if found is None and length is None:
            self.replacements[name] = tensor.name
            return
        module = (found or length)["module"]  # type: ignore[index]
        change = self.changes.setdefault(f"{module}.weight", LowRank())
        if length is not None:
            change.magnitude = tensor.name
        elif found is not None:
            change.sides[found["side"]] = tensor.name
            change.transposed = bool(found["embedding"]) or bool(self.settings.get("fan_in_fan_out"))

    def _info(self, name: str, change: LowRank) -> TensorInfo:
        if change.sides.keys() != {"A", "B"}:
            raise BadInput(f"{self.id}: got {name} with {sorted(change.sides)} of its factors, expected A and B")
        a, b = (self.stored.info(change.sides[side]) for side in "AB")
        if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
            raise BadInput(f"{self.id}: got factors of shape {b.shape} and {a.shape} for {name}, expected B A to exist")
        change.scale = scale_of(self.settings, name.removesuffix(".weight"), self.id)
        shape = (b.shape[0], *a.shape[1:])
        shape = shape[::-1] if change.transposed else shape
        note = self.why_not(name) if change.magnitude is None else DORA
        return TensorInfo(name=name, shape=shape, dtype=f"delta:{a.dtype}", note=note)

    def why_not(self, name: str) -> str:
        """Why the factors of a module cannot be read as s B A; empty when they can."""
        module = name.removesuffix(".weight")
        inner = [str(target).rpartition(".") for target in self.settings.get("target_parameters") or ()]
        if module.endswith(".base_layer") or any(
            f".{module}".endswith(f".{path}") and leaf != "weight" for path, _, leaf in inner
        ):
            return "factors of a parameter that holds several experts: not understood"
        return ""


def read_settings(path: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a LoRA.

    Args:
        path: the adapter's directory.

    Raises:
        BadInput: the file is damaged, or describes another kind of adapter.
    """
    file = path / "adapter_config.json"
    settings = read_object(path, file, expected="an adapter's configuration")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{file.name}: got an adapter of type {kind!r}, expected LORA; merge it into its base first")
    if used := [name for name in UNSUPPORTED if settings.get(name)]:
        raise BadInput(f"{file.name}: got {used[0]}, expected a LoRA whose difference is B A; merge it into its base")
    return settings


def scale_of(settings: Mapping[str, Any], module: str, id_: str) -> float:
    """The scale alpha / r of a module (alpha / sqrt(r) for rsLoRA); a pattern that matches its name comes first."""
    rank = _by_pattern(settings, "rank_pattern", module, settings.get("r", 8))
    alpha = _by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha", 8))
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in (rank, alpha)):
        raise BadInput(f"{id_}: got r {rank!r} and lora_alpha {alpha!r} for {module}, expected numbers")
    if rank <= 0:
        raise BadInput(f"{id_}: got r {rank!r} for {module}, expected a rank above 0")
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _by_pattern(settings: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches it."""
    patterns = settings.get(name) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadInput(f"{name}: got {pattern!r}, expected a regular expression ({error})") from error
    return default
