"""The cache: what was computed is not computed again, what changed is, and nothing damaged is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import htsr
from htsr import cache as cache_module
from htsr import scan as scan_function
from htsr.cache import Cache, code_files, entry_key
from htsr.files import cache_directory
from htsr.model.layers import views
from htsr.model.open import open_source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that takes matrices of any size."""
    monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "MIN_FLOPS", 0)
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose spectra were really computed."""
    import sys

    scanner, seen = sys.modules["htsr.scanner"], []
    exact = scanner.analyse
    monkeypatch.setattr(
        scanner, "analyse", lambda s, v, p: (seen.append(v.tensor) if not v.reason else None) or exact(s, v, p)
    )
    return seen


def weights(seed: int = 0, names: tuple[str, ...] = ("q", "k", "v", "o")) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.{n}_proj.weight": torch.randn(40, 24, generator=rng) for i in range(2) for n in names}


def scan(model: Any, **options: Any) -> htsr.ScanResult:
    return scan_function(model, calibration=None, quiet=True, workers=1, **options)


def numbers(result: htsr.ScanResult) -> pd.DataFrame:
    return result.frame.drop(columns="seconds")


def test_a_repeated_scan_computes_nothing_and_gives_the_same_bits(folder: Path, computed: list[str]) -> None:
    state = weights()
    first = scan(state)
    assert len(computed) == len(state)
    assert first.provenance["spectra"]["cached"] == 0
    second = scan({name: tensor.clone() for name, tensor in state.items()})
    assert len(computed) == len(state)
    assert second.provenance["spectra"]["cached"] == len(state)
    pd.testing.assert_frame_equal(numbers(first), numbers(second), check_exact=True)
    assert first.spectra is not None
    assert second.spectra is not None
    assert all(np.array_equal(first.spectra[name], second.spectra[name]) for name in state)


def test_fresh_computes_everything_again(folder: Path, computed: list[str]) -> None:
    scan(weights())
    result = scan(weights(), fresh=True)
    assert len(computed) == 2 * len(weights())
    assert result.provenance["spectra"]["cached"] == 0


def test_an_interrupted_scan_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    import sys

    scanner = sys.modules["htsr.scanner"]
    counting = scanner.analyse

    def stop_half_way(source: Any, view: Any, precision: str) -> Any:
        if len(computed) == 4:
            raise KeyboardInterrupt
        return counting(source, view, precision)

    monkeypatch.setattr(scanner, "analyse", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "model.safetensors")
    monkeypatch.setattr(scanner, "analyse", counting)
    before = list(computed)
    result = scan(tmp_path / "model.safetensors")
    assert len(before) == 4
    assert sorted(computed) == sorted(weights())  # each exactly once over both
    assert result.provenance["spectra"]["cached"] == 4
    pd.testing.assert_frame_equal(numbers(result), numbers(scan(weights(), fresh=True)), check_exact=True)


def test_names_and_files_do_not_matter_but_content_does(folder: Path, tmp_path: Path, computed: list[str]) -> None:
    state = weights()
    scan(state)
    computed.clear()
    renamed = {name.replace("layers", "model.h"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    moved = scan(tmp_path / "model.safetensors")
    assert computed == []
    assert set(moved.frame["tensor"]) == set(renamed)
    state["layers.1.v_proj.weight"][3, 3] += 1e-6
    scan(state)
    assert computed == ["layers.1.v_proj.weight"]


def test_precision_dtype_shape_and_code_are_part_of_the_key(
    folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, W = "layers.0.q_proj.weight", weights()["layers.0.q_proj.weight"]
    scan({name: W})
    for other in ({name: W.reshape(24, 40)}, {name: W.double()}):
        computed.clear()
        scan(other)
        assert computed == [name]
    computed.clear()
    scan({name: W}, precision="fp64")
    scan({name: W}, precision="fp32")
    assert computed == [name, name]
    monkeypatch.setattr(cache_module, "code_version", lambda: "another")
    scan({name: W})
    assert len(computed) == 3


def test_the_code_that_entries_depend_on_is_where_the_list_says() -> None:
    files = code_files()
    assert all(file.is_file() for file in files)
    root = Path(cache_module.__file__).parent
    inside = {file.relative_to(root).as_posix() for file in files}
    assert {"matrix_row.py", "model/parts.py", "model/reading.py", "numerics/powerlaw.py"} <= inside


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign", "directory"])
def test_a_damaged_entry_is_computed_again(folder: Path, computed: list[str], damage: str) -> None:
    state = {"layers.0.q_proj.weight": weights()["layers.0.q_proj.weight"]}
    first = scan(state)
    (entry,) = [file for file in folder.rglob("*") if file.is_file()]
    content = entry.read_bytes()
    match damage:
        case "cut":
            entry.write_bytes(content[:-8])
        case "flip":
            entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            entry.write_bytes(b"")
        case "foreign":  # a sound entry of another matrix
            scan({"layers.0.k_proj.weight": 2 * state["layers.0.q_proj.weight"]})
            (other,) = [file for file in folder.rglob("*") if file.is_file() and file != entry]
            entry.write_bytes(other.read_bytes())
        case "directory":
            entry.unlink()
            entry.mkdir()
    computed.clear()
    pd.testing.assert_frame_equal(numbers(scan(state)), numbers(first), check_exact=True)
    assert computed == list(state)
    if damage != "directory":
        computed.clear()
        scan(state)
        assert computed == []  # and it was repaired


def test_failed_rows_are_not_kept(folder: Path, computed: list[str]) -> None:
    state = weights(names=("q",))
    state["layers.0.q_proj.weight"][0, 0] = float("nan")
    scan(state)
    computed.clear()
    assert scan(state).frame["status"].tolist() == ["failed", "ok"]
    assert computed == ["layers.0.q_proj.weight"]


def test_entries_appear_whole_and_leave_no_litter(folder: Path) -> None:
    cache = Cache(folder)
    cache.put("ab12", {"alpha": np.float64(2.5), "n_tail": np.int64(3), "xmin": float("nan")}, np.arange(3.0))
    kept = cache.get("ab12")
    assert kept is not None
    assert (kept[0]["alpha"], kept[0]["n_tail"]) == (2.5, 3)
    assert np.array_equal(kept[1], np.arange(3.0))
    assert cache.get("ab13") is None
    assert [f.name for f in folder.rglob("*") if f.is_file()] == ["12"]


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cache_module, "MIN_FLOPS", 0)
    scan(weights())
    assert len(computed) == 8


def test_small_matrices_stay_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MIN_FLOPS", 1e7)
    scan(weights())
    assert not list(folder.rglob("*"))


def test_the_place_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "here"))
    assert cache_directory("htsr") == tmp_path / "here"
    monkeypatch.delenv("HTSR_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory("htsr") == tmp_path / "xdg" / "htsr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("htsr") == tmp_path / ".cache" / "htsr"


def test_parts_of_one_tensor_have_keys_of_their_own() -> None:
    stack = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    source = open_source({"layers.0.mlp.experts.gate_up_proj": stack, "layers.1.mlp.experts.gate_up_proj": stack + 0})
    layers = [view for view in views(source) if not view.reason]
    keys = [entry_key(source, view, precision="auto") for view in layers]
    assert len(layers) > 2
    assert len(set(keys)) == len(keys) // 2  # equal only to the same part of the equal tensor
