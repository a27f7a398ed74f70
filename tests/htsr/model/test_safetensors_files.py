"""Damaged and hostile safetensors directories end in BadInput, never in another error or another file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from htsr.errors import BadInput
from htsr.model import safetensors_files
from htsr.model.open import open_source

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a.weight": torch.ones(8, 9), "b.weight": torch.zeros(9, 8)}, directory / SHARD)
    write_index(directory, {"a.weight": SHARD, "b.weight": SHARD})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sound_index_opens(sharded: Path) -> None:
    assert len(open_source(sharded).tensors) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "c:x.safetensors",
        "x\0.safetensors", "..safetensors", "weights.bin", "missing.safetensors", "", 3, None, ["x"], {"a": 1},
    ],
)  # fmt: skip
def test_a_file_name_that_is_not_plain_or_absent_is_refused(sharded: Path, name: Any) -> None:
    outside = sharded.parent / "x.safetensors"
    save_file({"a.weight": torch.ones(8, 9)}, outside)
    write_index(sharded, {"a.weight": name, "b.weight": SHARD})
    with pytest.raises(BadInput):
        open_source(sharded)


def test_a_tensor_that_its_file_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a.weight": SHARD, "b.weight": SHARD, "c.weight": SHARD})
    with pytest.raises(BadInput, match=r"c\.weight"):
        open_source(sharded)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    save_file({"a.weight": torch.ones(8, 9)}, sharded / "other.safetensors")
    write_index(sharded, {"a.weight": "other.safetensors", "b.weight": SHARD})
    with pytest.raises(BadInput, match="another file"):
        open_source(sharded)


def test_a_name_twice_in_the_index_is_refused(sharded: Path) -> None:
    text = f'{{"weight_map": {{"a.weight": "{SHARD}", "b.weight": "{SHARD}", "a.weight": "{SHARD}"}}}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="twice"):
        open_source(sharded)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a": NaN}', "[" * 10**5]
)
def test_an_index_that_is_no_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadInput):
        open_source(sharded)


def test_an_index_of_absurd_size_is_refused(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "MAX_TENSORS", 1)
    with pytest.raises(BadInput, match="at most 1"):
        open_source(sharded)
    monkeypatch.setattr(safetensors_files, "MAX_INDEX_BYTES", 10)
    with pytest.raises(BadInput, match="at most 10"):
        open_source(sharded)


@pytest.mark.parametrize("victim", [SHARD, "model.safetensors.index.json", "config.json"])
def test_a_link_out_of_the_directory_is_refused(sharded: Path, victim: str) -> None:
    (sharded / "config.json").write_text("{}")
    target = sharded.parent / victim
    (sharded / victim).rename(target)
    (sharded / victim).symlink_to(target)
    with pytest.raises(BadInput, match="out of the model's directory"):
        open_source(sharded)


def test_a_link_inside_the_directory_and_a_link_to_the_directory_are_fine(sharded: Path) -> None:
    (sharded / SHARD).rename(sharded / "real.safetensors")
    (sharded / SHARD).symlink_to("real.safetensors")
    alias = sharded.parent / "alias"
    alias.symlink_to(sharded)
    assert len(open_source(alias).tensors) == 2


def test_a_lone_file_that_is_a_link_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "w.safetensors").symlink_to(sharded / SHARD)
    with pytest.raises(BadInput, match="out of the model's directory"):
        open_source(folder / "w.safetensors")


def test_a_pipe_in_place_of_weights_is_refused(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    os.mkfifo(sharded / SHARD)
    with pytest.raises(BadInput, match="regular file"):
        open_source(sharded)


def file_with_header(path: Path, header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"w": 3},
        {"w": {"dtype": "F32", "shape": [4, 4]}},
        {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 63]}},
        {"w": {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}},
        {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 0]}},
        {"w": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [4.0, 4], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [True, 16], "data_offsets": [0, 64]}},
        {"w": {"dtype": 7, "shape": [4, 4], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": None, "data_offsets": [0, 64]}},
        b'{"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "w": {}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(BadInput):
        open_source(file_with_header(tmp_path / "w.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 10**9, 200])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(BadInput, match="cut short"):
        open_source(file_with_header(tmp_path / "w.safetensors", {}, length=length))


def test_random_damage_ends_in_our_error_or_in_a_readable_file(tmp_path: Path) -> None:
    sound = bytearray(save({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(3)}))
    rng = np.random.default_rng(0)
    path = tmp_path / "w.safetensors"
    for _ in range(300):
        damaged = bytearray(sound[: rng.integers(len(sound) + 1)]) if rng.random() < 0.3 else bytearray(sound)
        for _ in range(rng.integers(1, 4)):
            if damaged:
                damaged[rng.integers(min(len(damaged), 180))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            source = open_source(path)
        except BadInput:
            continue
        assert all(len(b"".join(source.raw(t.name))) >= 0 for t in source.tensors)


def test_a_file_cut_short_after_listing_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut short"):
        source.read("w")


def test_an_unknown_dtype_is_listed_and_not_read(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [8, 16], "data_offsets": [0, 64]}}
    (tensor,) = open_source(file_with_header(tmp_path / "w.safetensors", header)).tensors
    assert tensor.dtype == "f4"
    assert not tensor.readable
