"""LOD of a model: calibration text through its blocks, input norms of every linear map, outliers of every block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from htsr.choices import SCOPES, check_choice
from htsr.errors import BadInput, HtsrError, UsageError
from htsr.model.layers import find_blocks, views
from htsr.model.skeleton import CannotStreamError, build_skeleton, model_config
from htsr.model.walk import MeasuredBlock, loaded_blocks, record_calls, stream_blocks
from htsr.model.windows import cut_windows, read_texts, tokenise
from htsr.numerics.outliers import count_above, importance_sum, percent, pool_limits

if TYPE_CHECKING:
    from htsr.model.source import Source

log = logging.getLogger(__name__)
Report = Callable[[int, int], None]  # blocks measured so far, blocks in all


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Percent of outlying weights; `lod` weighs by input norms, `lod_weight` does not. NaN where not computed."""

    lod: float
    lod_weight: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The outliers of a model and the text they were measured with.

    Attributes:
        blocks: by block index, pooled over the block's linear maps.
        matrices: by (block, role); under block scope counted against the block's pooled limit.
        source, sha256: the text and the hash of its bytes.
        windows, seq_len, samples, seed: what was run, and what chose it.
        route: `streamed` block by block, or why the model was run as a whole.
    """

    blocks: Mapping[int, Outliers]
    matrices: Mapping[tuple[int, str], Outliers]
    source: str
    sha256: str
    windows: int
    seq_len: int
    samples: int
    seed: int
    tau: float
    scope: str
    route: str

    def record(self) -> dict[str, Any]:
        """What scan.json keeps of it."""
        names = ("source", "sha256", "windows", "seq_len", "samples", "seed", "tau", "scope", "route")
        return {name: getattr(self, name) for name in names}


def calibrate(
    source: Source,
    calibration: str | Path = "builtin",
    *,
    tau: float = 13.0,
    scope: str = "block",
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tokenizer: Any = None,
    progress: Report | None = None,
) -> Calibration:
    """Measure the LOD of every block and matrix.

    Args:
        source: an open model; it is read, never changed.
        calibration: `builtin`, a .txt file (one text) or a .jsonl file (rows with `text`).
        tau: an outlier is strictly above tau times the mean importance.
        scope: `block` pools the mean over the block's linear maps, `matrix` gives each its own.
        samples, seq_len, seed: number, length (at most the model's maximum) and choice of the windows.
        tokenizer: for a model that has none of its own.
        progress: called with (blocks done, blocks) as blocks are measured.

    Raises:
        UsageError: an unknown scope, or a number out of range.
        NotFound: no such text.
        BadInput: no configuration, no tokenizer, or a text that cannot be used.
    """
    check_choice("lod-scope", scope, SCOPES)
    _check_tau(tau)
    text = read_texts(calibration)
    if source.is_delta:
        raise BadInput(f"{source.id}: these are differences of weights, expected a model to run the calibration text")
    seq_len = min(seq_len, longest_window(source) or seq_len)
    tokens = tokenise(text.texts, tokenizer if tokenizer is not None else load_tokenizer(source))
    windows = cut_windows(tokens, samples=samples, seq_len=seq_len, seed=seed)
    route, depth, walk = _walk(source, windows, device)
    shares = fused_shares(source)
    blocks: dict[int, Outliers] = {}
    matrices: dict[tuple[int, str], Outliers] = {}
    for measured in _guarded(walk, source):
        blocks[measured.index], roles = block_outliers(measured, tau, scope, shares)
        matrices |= {(measured.index, role): outliers for role, outliers in roles.items()}
        if progress is not None:
            progress(len(blocks), depth)
    return Calibration(
        blocks=blocks,
        matrices=matrices,
        source=text.source,
        sha256=text.sha256,
        windows=len(windows),
        seq_len=seq_len,
        samples=samples,
        seed=seed,
        tau=float(tau),
        scope=scope,
        route=route,
    )


Shares = Mapping[tuple[int, str], Sequence[tuple[str, np.ndarray]]]


def fused_shares(source: Source) -> Shares:
    """(block, role) of a fused matrix -> role and outputs of each of its parts."""
    layers = views(source)
    roles = {(view.block, view.tensor): view.role for view in layers}
    shares: dict[tuple[int, str], list[tuple[str, np.ndarray]]] = {}
    for view in layers:
        if view.part is not None and view.part_of and view.block is not None:
            outputs = view.part.cols if view.transposed else view.part.rows
            shares.setdefault((view.block, roles[view.block, view.part_of]), []).append((view.role, outputs.indices()))
    return shares


def block_outliers(
    measured: MeasuredBlock, tau: float, scope: str = "block", shares: Shares | None = None
) -> tuple[Outliers, dict[str, Outliers]]:
    """The outliers of a block and of its matrices by role, with input norms and without; of parts of fused ones too."""
    maps = [(m.role, [m.weight], m.square_sums.sqrt()) for m in measured.maps]
    parts = [
        (role, [m.weight[torch.from_numpy(outputs)]], m.square_sums.sqrt())
        for m in measured.maps
        for role, outputs in (shares or {}).get((measured.index, m.role), ())
    ]
    weighed = _pool(maps, parts, tau, scope)
    plain = _pool([(role, w, None) for role, w, _ in maps], [(role, w, None) for role, w, _ in parts], tau, scope)
    roles = {role: Outliers(lod=weighed[1][role], lod_weight=plain[1][role]) for role in weighed[1]}
    return Outliers(lod=weighed[0], lod_weight=plain[0]), roles


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that lies beside the source's weights.

    Raises:
        BadInput: there is none, or it cannot be used without running code from the model's directory.
    """
    if source.path is None:
        raise BadInput(f"{source.id}: no tokenizer comes with a model in memory, expected one; pass tokenizer=")
    from transformers import AutoTokenizer

    from htsr.console import quiet_libraries

    folder, extra = _folder(source.path)
    try:
        with quiet_libraries(prints=True):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **extra)
    except Exception as error:  # whatever a broken tokenizer file makes the libraries raise
        raise BadInput(
            f"{source.id}: no usable tokenizer ({_brief(error)}), expected one beside the weights"
        ) from error


def longest_window(source: Source) -> int | None:
    """The longest sequence the model can read, None where nothing says so."""
    if source.module is not None and source.config is None:
        return None
    text = model_config(source).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


Maps = Sequence[tuple[str, Any, Tensor | None]]  # name, slices of the weights, norms of the inputs


def _pool(maps: Maps, parts: Maps, tau: float, scope: str) -> tuple[float, dict[str, float]]:
    """LOD in percent of the pool of `maps`, and of each map and part by name.

    Under matrix scope each has its own limit, and the pool's LOD is the share of all its weights above theirs. Parts
    are weights of the maps once more: they count against the limit, not towards it.
    """
    everything = [*maps, *parts]
    sums = [importance_sum(slices, norms) for _, slices, norms in everything]
    pooled = [pool_limits(sums[: len(maps)], [tau])[0]] * len(sums) if sums else []
    limits = pooled if scope == "block" else [pool_limits([s], [tau])[0] for s in sums]
    counts = [
        int(count_above(slices, [limit], norms)[0])
        for (_, slices, norms), limit in zip(everything, limits, strict=True)
    ]
    each = {
        name: percent(count, s.numel, limit)
        for (name, _, _), count, s, limit in zip(everything, counts, sums, limits, strict=True)
    }
    own = slice(len(maps))
    return percent(sum(counts[own]), sum(s.numel for s in sums[own]), sum(limits[own])), each


def _walk(source: Source, windows: Tensor, device: str | torch.device) -> tuple[str, int, Iterator[MeasuredBlock]]:
    """How the model is run, its number of blocks, and the walk itself."""
    try:
        skeleton = build_skeleton(source, device)
        _check_vocabulary(skeleton.model, windows)
        calls = record_calls(skeleton, windows)
        return "streamed", len(skeleton.stack.modules), stream_blocks(skeleton, calls)
    except CannotStreamError as error:
        reason = str(error)
    except BadInput:
        if source.module is None:
            raise
        reason = "no configuration says how to build it"
    model = source.module if source.module is not None else _load(source, device)
    log.info("%s is run as a whole: %s", source.id, reason)
    _check_vocabulary(model, windows)
    return f"run as a whole: {reason}", len(find_blocks(model).modules), loaded_blocks(model, windows)


def _load(source: Source, device: str | torch.device) -> nn.Module:
    from transformers import AutoModel

    from htsr.console import quiet_libraries

    if source.path is None or not source.complete:
        raise BadInput(f"{source.id}: these weights cannot be run, expected a model that lies in files or a module")
    folder, extra = _folder(source.path)
    try:
        with quiet_libraries(prints=True):
            model: nn.Module = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                experts_implementation="eager",
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise BadInput(f"{source.id}: transformers cannot load it ({_brief(error)})") from error
    return model.to(device)


def _folder(path: Path) -> tuple[Path, dict[str, str]]:
    """What transformers' from_pretrained wants for a directory or a file in one."""
    if path.is_dir():
        return path, {}
    return path.parent, {"gguf_file": path.name} if path.suffix == ".gguf" else {}


def _guarded(walk: Iterator[MeasuredBlock], source: Source) -> Iterator[MeasuredBlock]:
    """The same walk; what a model raises that cannot be called with text alone becomes BadInput."""
    try:
        yield from walk
    except (HtsrError, torch.OutOfMemoryError):
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, NotImplementedError) as error:
        raise BadInput(
            f"{source.id}: text cannot be run through it ({_brief(error)}), expected a text model"
        ) from error


def _check_vocabulary(model: nn.Module, windows: Tensor) -> None:
    """Raise BadInput when the tokenizer makes ids that the model has no embedding for."""
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise BadInput(f"got a {type(model).__name__}, which reads {reads}, expected a model that reads text")
    access = getattr(model, "get_input_embeddings", None)
    try:
        table = access() if access is not None else None
    except NotImplementedError:  # a model of several towers has none of its own
        table = None
    rows = getattr(table, "num_embeddings", None)
    if rows is not None and int(windows.max()) >= rows:
        raise BadInput(f"tokenizer: got token {int(windows.max())}, expected ids below {rows}; it is another model's")


def _check_tau(tau: float) -> None:
    if not 0 < tau < float("inf"):
        raise UsageError(f"tau: got {tau}, expected a number above 0 (13 in OwLore, 3 to 7 in OWL)")


def _brief(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
