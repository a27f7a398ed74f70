"""LOD of a model: calibration text through its blocks, input norms of every linear map, outliers of every block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from htsr.choices import SCOPES, check_choice
from htsr.errors import BadInput, HtsrError, first_line
from htsr.model.blocks import find_blocks
from htsr.model.convergence import Convergence, convergence
from htsr.model.meters import MeasuredBlock
from htsr.model.outlier_pooling import Outliers, block_outliers, fused_shares
from htsr.model.rounding import PROBE_WINDOWS, WORTHWHILE, Rounding, has_bf16_units, judge
from htsr.model.skeleton import CannotStreamError, build_skeleton, input_embeddings, model_config
from htsr.model.walk import loaded_blocks, record_calls, stream_blocks
from htsr.model.windows import cut_windows, read_texts, tokenise
from htsr.taus import check_taus

if TYPE_CHECKING:
    from htsr.model.source import Source

log = logging.getLogger(__name__)
Report = Callable[[int, int], None]  # blocks measured so far, blocks in all
Blocks = Iterator[tuple[MeasuredBlock, ...]]  # one measurement of the block for each precision


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The outliers of a model and the text they were measured with.

    Attributes:
        blocks: block index -> outliers, pooled over the block's linear maps.
        matrices: (block, role) -> outliers; under block scope counted against the block's limit.
        source: the text as the user named it.
        sha256: hash of the text's bytes.
        windows: number of windows that were run.
        seq_len: tokens in a window.
        samples: number of windows that the user set.
        seed: chose the windows.
        taus: the outlier limits; the first has the plain column names.
        scope: `block` or `matrix`, what the mean was taken over.
        route: `streamed` block by block, or why the model was run as a whole.
        rounding: the precision that the text ran in, and why.
        convergence: LOD by the two halves of the windows; None for one window.
    """

    blocks: Mapping[int, Outliers]
    matrices: Mapping[tuple[int, str], Outliers]
    source: str
    sha256: str
    windows: int
    seq_len: int
    samples: int
    seed: int
    taus: tuple[float, ...]
    scope: str
    route: str
    rounding: Rounding
    convergence: Convergence | None

    def record(self) -> dict[str, Any]:
        """The part of the calibration that scan.json stores."""
        names = ("source", "sha256", "windows", "seq_len", "samples", "seed", "scope", "route")
        return {name: getattr(self, name) for name in names} | {
            "tau": self.taus[0],
            "taus": list(self.taus),
            "precision": self.rounding.record(),
            "convergence": None if self.convergence is None else self.convergence.record(),
        }


def calibrate(
    source: Source,
    calibration: str | Path = "builtin",
    *,
    tau: float | Sequence[float] = 13.0,
    scope: str = "block",
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    exact: bool = False,
    tokenizer: Any = None,
    progress: Report | None = None,
) -> Calibration:
    """Measure the LOD of every block and matrix.

    Args:
        source: an open model; it is read, never changed.
        calibration: `builtin`, a .txt file (one text) or a .jsonl file (rows with `text`).
        tau: an outlier is strictly above tau times the mean importance; several are counted in one pass.
        scope: `block` pools the mean over the block's linear maps, `matrix` takes the mean of each map.
        samples: number of windows, at least 1.
        seq_len: tokens in a window, at least 1; the model's maximum is used where it is smaller.
        seed: chooses the windows.
        device: where the text runs.
        exact: runs the text in float32 also where bfloat16 is faster and shown to give the same table.
        tokenizer: replaces the tokenizer beside the weights; needed for a model in memory.
        progress: called with (blocks done, blocks) as blocks are measured.

    Raises:
        UsageError: an unknown scope, or a number out of range.
        NotFound: there is no such text.
        BadInput: there is no configuration or tokenizer, or the text cannot be used.
    """
    check_choice("lod-scope", scope, SCOPES)
    taus = check_taus(tau)
    text = read_texts(calibration)
    if source.is_delta:
        raise BadInput(f"{source.id}: these are differences of weights, expected a model to run the calibration text")
    seq_len = min(seq_len, longest_window(source) or seq_len)
    tokens = tokenise(text.texts, tokenizer if tokenizer is not None else load_tokenizer(source))
    windows = cut_windows(tokens, samples=samples, seq_len=seq_len, seed=seed)
    walk = _plan(source, windows, device)
    shares = fused_shares(source)
    rounding = Rounding("it was asked for") if exact else _choose(walk, taus, scope)
    blocks: dict[int, Outliers] = {}
    matrices: dict[tuple[int, str], Outliers] = {}
    for (measured,) in walk.blocks(len(windows), (rounding.dtype,)):
        blocks[measured.index], roles = block_outliers(measured, taus, scope, shares)
        matrices |= {(measured.index, role): outliers for role, outliers in roles.items()}
        if progress is not None:
            progress(len(blocks), walk.depth)
    return Calibration(
        blocks=blocks,
        matrices=matrices,
        source=text.source,
        sha256=text.sha256,
        windows=len(windows),
        seq_len=seq_len,
        samples=samples,
        seed=seed,
        taus=taus,
        scope=scope,
        route=walk.route,
        rounding=rounding,
        convergence=convergence([blocks[index].halves for index in sorted(blocks)], len(windows)),
    )


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer that lies beside the weights.

    Args:
        source: an open model.

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
            f"{source.id}: no usable tokenizer ({first_line(error)}), expected one beside the weights"
        ) from error


def longest_window(source: Source) -> int | None:
    """The longest sequence that the model can read, in tokens; None where its configuration does not say."""
    if source.module is not None and source.config is None:
        return None
    text = model_config(source).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """How the text is run through a model.

    Attributes:
        route: `streamed`, or why the model is run as a whole.
        depth: number of blocks.
        blocks: (count, dtypes) -> the blocks measured on the first `count` windows, with products in each of `dtypes`;
            a model that is run as a whole is measured once, in its own precision.
        windows: number of windows.
        device: the device of a streamed model, else None.
    """

    route: str
    depth: int
    blocks: Callable[[int, Sequence[torch.dtype]], Blocks]
    windows: int
    device: torch.device | None = None  # of a streamed model


def _plan(source: Source, windows: Tensor, device: str | torch.device) -> _Walk:
    try:
        skeleton = build_skeleton(source, device)
        _check_vocabulary(skeleton.model, windows)
        recorder = record_calls(skeleton, windows)
        return _Walk(
            route="streamed",
            depth=len(skeleton.stack.modules),
            blocks=lambda n, dtypes: _guarded(stream_blocks(recorder, n, dtypes), source),
            windows=len(windows),
            device=skeleton.device,
        )
    except CannotStreamError as error:
        reason = str(error)
    except BadInput:
        if source.module is None:
            raise
        reason = "no configuration says how to build it"
    model = source.module if source.module is not None else _load(source, device)
    log.info("%s is run as a whole: %s", source.id, reason)
    _check_vocabulary(model, windows)
    return _Walk(
        route=f"run as a whole: {reason}",
        depth=len(find_blocks(model).modules),
        blocks=lambda n, _: _guarded(((block,) for block in loaded_blocks(model, windows[:n])), source),
        windows=len(windows),
    )


def _choose(walk: _Walk, taus: Sequence[float], scope: str) -> Rounding:
    """Choose bfloat16 where it is fast, saves time, and moves no block's LOD; see `htsr.model.rounding`."""
    if walk.device is None:
        return Rounding("a model that is run as a whole is run as it is")
    if not has_bf16_units(walk.device):
        return Rounding(f"{walk.device} has no bfloat16 units")
    if walk.windows < WORTHWHILE:
        return Rounding(f"{walk.windows} windows take no longer than to see whether bfloat16 is safe")
    both = walk.blocks(PROBE_WINDOWS, (torch.float32, torch.bfloat16))
    count = partial(block_outliers, taus=taus[:1], scope=scope)
    return judge((exact.size, count(exact)[0], count(rounded)[0]) for exact, rounded in both)


def _load(source: Source, device: str | torch.device) -> nn.Module:
    from transformers import AutoModel

    from htsr.console import quiet_libraries

    if source.path is None or not source.complete:
        raise BadInput(f"{source.id}: these weights cannot be run, expected a model that lies in files or a module")
    folder, extra = _folder(source.path)
    try:
        with quiet_libraries(prints=True):
            read: Any = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                experts_implementation="eager",
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise BadInput(f"{source.id}: transformers cannot load it ({first_line(error)})") from error
    model: nn.Module = read[0]
    inside = {id(parameter) for block in find_blocks(model).modules for parameter in block.parameters()}
    parameters = dict(model.named_parameters())
    if missing := sorted(n for n in read[1]["missing_keys"] if id(parameters.get(n)) in inside):
        raise BadInput(f"{source.id}: holds no {missing[0]}, which its configuration asks for")  # random otherwise
    return model.to(device)


def _folder(path: Path) -> tuple[Path, dict[str, str]]:
    """The directory and the keywords that transformers' from_pretrained takes for a directory, or for a file in one."""
    if path.is_dir():
        return path, {}
    return path.parent, {"gguf_file": path.name} if path.suffix == ".gguf" else {}


def _guarded(blocks: Blocks, source: Source) -> Blocks:
    """Yield the blocks; an error of a model that cannot be called with text alone becomes BadInput."""
    try:
        yield from blocks
    except (HtsrError, torch.OutOfMemoryError):
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, NotImplementedError) as error:
        raise BadInput(
            f"{source.id}: text cannot be run through it ({first_line(error)}), expected a text model"
        ) from error


def _check_vocabulary(model: nn.Module, windows: Tensor) -> None:
    """Raise BadInput when the tokenizer makes ids that the model has no embedding for."""
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise BadInput(f"got a {type(model).__name__}, which reads {reads}, expected a model that reads text")
    rows = getattr(input_embeddings(model), "num_embeddings", None)
    if rows is not None and int(windows.max()) >= rows:
        raise BadInput(f"tokenizer: got token {int(windows.max())}, expected ids below {rows}; it is another model's")
