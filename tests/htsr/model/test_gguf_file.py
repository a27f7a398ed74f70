"""GGUF files: dequantised values, labels, and the same slices as of the whole tensor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htsr.errors import BadInput
from htsr.model.layers import num_blocks, views
from htsr.model.open import open_source
from htsr.model.reading import read_slice
from htsr.numerics.spectrum import MatrixSlice, eigenvalues
from htsr.scanner import scan

gguf = pytest.importorskip("gguf")
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")
LABELS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weights(kind: str, rows: int = 24, cols: int = 512) -> np.ndarray:
    return np.random.default_rng(KINDS.index(kind)).normal(size=(rows, cols)).astype(np.float32)


def quantised(W: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(W, gguf.GGMLQuantizationType[kind])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for block, kind in enumerate(KINDS):
        W = weights(kind)
        data: Any = (
            W.astype({"F32": np.float32, "F16": np.float16}[kind]) if kind in ("F32", "F16") else quantised(W, kind)
        )
        writer.add_tensor(f"blk.{block}.attn_q.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_dequantised_and_labelled(file: Path, kind: str) -> None:
    source = open_source(file)
    name = f"blk.{KINDS.index(kind)}.attn_q.weight"
    expected = gguf.quants.dequantize(quantised(weights(kind), kind), gguf.GGMLQuantizationType[kind])
    assert source.info(name).dtype == LABELS.get(kind, f"dequantised:{kind}")
    assert source.info(name).shape == (24, 512)
    assert np.array_equal(source.read(name).float().numpy(), expected)
    assert source.read(name).dtype == getattr(torch, LABELS.get(kind, "float32"))
    for block in (MatrixSlice(3, 9), MatrixSlice(256, 512, axis=1), MatrixSlice(0, 256, axis=1)):
        part = expected[block.start : block.stop] if block.axis == 0 else expected[:, block.start : block.stop]
        assert np.array_equal(source.array(name, block).astype(np.float32), part)


def test_vectors_and_blocks_are_listed(file: Path) -> None:
    source = open_source(file)
    assert torch.equal(source.read("blk.0.attn_norm.weight"), torch.arange(5.0))
    assert num_blocks(source) == len(KINDS)
    assert {v.role for v in views(source)} == {"q", "norm"}


def test_a_scan_of_gguf_labels_its_rows_and_reads_the_dequantised_spectrum(file: Path) -> None:
    result = scan(file, calibration=None, quiet=True)
    rows = result.frame.set_index("tensor")
    for block, kind in enumerate(KINDS):
        row = rows.loc[f"blk.{block}.attn_q.weight"]
        values = eigenvalues(open_source(file).read(row.name))
        assert row["dtype"] == LABELS.get(kind, f"dequantised:{kind}")
        assert row["lambda_max"] == pytest.approx(values[-1], rel=1e-12)


def test_a_directory_with_one_gguf_file_is_that_file(file: Path, tmp_path: Path) -> None:
    assert open_source(file.parent).weights_sha256() == open_source(file).weights_sha256()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="name the file"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 30, 200])
def test_a_damaged_file_is_bad_input(file: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadInput):
        open_source(tmp_path / "cut.gguf")


def test_without_the_package_the_error_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match=r"pip install 'htsr-owlore\[gguf\]'"):
        open_source(file)


def test_experts_and_fused_projections_are_read_out_of_quantised_stacks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stack, fused = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 24, 64), (96, 64)))
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    for block in range(2):
        for part in ("gate", "up"):
            data = gguf.quants.quantize(stack + block, kind)
            writer.add_tensor(f"blk.{block}.ffn_{part}_exps.weight", data, raw_dtype=kind)
        writer.add_tensor(f"blk.{block}.attn_qkv.weight", gguf.quants.quantize(fused, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "moe.gguf")
    found = {(view.block, view.role): view for view in views(source)}
    roles = {f"experts.{e}.{part}" for e in range(3) for part in ("gate", "up")} | {"qkv"}
    assert found.keys() == {(block, role) for block in range(2) for role in roles}  # no widths known, so no q, k, v
    expected = gguf.quants.dequantize(gguf.quants.quantize(stack + 1, kind), kind)
    view = found[1, "experts.2.up"]
    assert (view.tensor, view.rows, view.cols) == ("blk.1.ffn_up_exps.weight[2]", 24, 64)
    for block in (MatrixSlice(3, 24), MatrixSlice(5, 40, axis=1)):
        part = expected[2][block.start : block.stop] if block.axis == 0 else expected[2][:, block.start : block.stop]
        assert np.array_equal(read_slice(source, view, block), part)
    frame = scan(tmp_path / "moe.gguf", calibration=None, quiet=True).frame.set_index("tensor")
    values = eigenvalues(expected[2])
    assert frame.loc[view.tensor, "lambda_max"] == pytest.approx(values[-1], rel=1e-12)
    assert frame.loc[view.tensor, "dtype"] == "dequantised:Q8_0"
