"""Every way to name a model gives the same tensors; slices are the tensors; what is unusable says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import makers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from htsr.errors import BadInput, NotFound
from htsr.model.open import open_source
from htsr.numerics.spectrum import MatrixSlice


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return makers.tiny_llama(blocks=2)


@pytest.fixture(scope="module")
def directory(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.save_tiny(tmp_path_factory.mktemp("model") / "tiny", model)


def shard(directory: Path, target: Path, *, parts: int = 3) -> Path:
    """The same weights in several files named by an index."""
    target.mkdir()
    tensors = load_file(directory / "model.safetensors")
    weight_map = {}
    for i in range(parts):
        name = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::parts]}
        save_file(part, target / name)
        weight_map |= dict.fromkeys(part, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    return target


def test_all_routes_to_the_same_weights_agree(model: nn.Module, directory: Path, tmp_path: Path) -> None:
    reference = open_source(directory)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    others = [
        open_source(model),
        open_source(model.state_dict()),
        open_source(str(directory / "model.safetensors")),
        open_source(shard(directory, tmp_path / "sharded")),
        open_source(tmp_path / "weights.bin", allow_pickle=True),
    ]
    for other in others:
        assert {(t.name, t.shape, t.dtype) for t in other.tensors} == {
            (t.name, t.shape, t.dtype) for t in reference.tensors
        }
        assert other.weights_sha256() == reference.weights_sha256()
        for tensor in reference.tensors:
            assert torch.equal(other.read(tensor.name), model.state_dict()[tensor.name])


def test_the_hash_sees_one_changed_bit_a_name_and_a_dtype() -> None:
    state = {"a": torch.zeros(3, 4), "b": torch.ones(2)}
    reference = open_source(state).weights_sha256()
    changed = {"a": state["a"].clone(), "b": state["b"]}
    changed["a"][2, 3] = 1e-30
    variants = [changed, {"c": state["a"], "b": state["b"]}, {"a": state["a"].half(), "b": state["b"]}]
    assert len({reference, *(open_source(v).weights_sha256() for v in variants)}) == 4
    assert open_source(dict(reversed(state.items()))).weights_sha256() == reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_slices_are_the_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    W = torch.randn(37, 23, generator=makers.generator(0)).to(dtype)
    save_file({"w": W, "scalar": torch.tensor(2.0)}, tmp_path / "w.safetensors")
    for source in (open_source(tmp_path / "w.safetensors"), open_source({"w": W, "scalar": torch.tensor(2.0)})):
        assert torch.equal(source.rows("w", 5, 17), W[5:17])
        assert source.rows("w", 5, 17).dtype == dtype
        assert source.read("scalar") == 2
        for block, part in ((MatrixSlice(5, 17), W[5:17]), (MatrixSlice(4, 9, axis=1), W[:, 4:9])):
            found = source.array("w", block)
            assert found.flags.c_contiguous
            assert np.array_equal(found.astype(np.float64), part.double().numpy())


def test_tied_weights_are_listed_once(tmp_path: Path) -> None:
    tied = makers.tiny_llama(blocks=1, tied=True)
    assert len(tied.state_dict()) == len(open_source(tied).tensors) + 1
    makers.save_tiny(tmp_path / "tied", tied)
    names = {t.name for t in open_source(tmp_path / "tied").tensors}
    assert names == {t.name for t in open_source(tied).tensors}
    # a file that stores the head although the configuration ties it: loading ignores the head, so does the list
    save_file({k: v.clone() for k, v in tied.state_dict().items()}, tmp_path / "tied" / "model.safetensors")
    assert {t.name for t in open_source(tmp_path / "tied").tensors} == names


def test_identity_of_each_route(model: nn.Module, directory: Path) -> None:
    assert open_source(directory).id == "tiny"
    assert open_source(directory).config == json.loads((directory / "config.json").read_text())
    assert open_source(directory).path == directory
    assert open_source(directory / "model.safetensors").config is None
    assert open_source(model).module is model
    assert open_source(nn.Linear(3, 2)).id == "Linear"
    assert open_source(nn.Linear(3, 2)).config is None
    assert open_source(nn.Linear(3, 2)).config_sha256() is None


def test_the_demo_is_in_the_package() -> None:
    demo = open_source("demo")
    assert demo.id == "demo"
    assert demo.config is not None
    assert demo.config["model_type"] == "llama"


def test_listing_and_reading_for_spectra_imports_no_torch(directory: Path) -> None:
    code = (
        "import sys; from htsr.model.open import open_source; from htsr.numerics.spectrum import MatrixSlice\n"
        f"s = open_source({str(directory)!r}); s.weights_sha256()\n"
        "s.array(s.tensors[0].name, MatrixSlice(0, 2)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "nowhere.safetensors", "some/../where"])
def test_a_missing_path_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match="no such file or directory"):
        open_source(name)


def test_a_directory_without_weights_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="without weights"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match=r"expected \.safetensors"):
        open_source(tmp_path / "notes.txt")


def test_an_adapter_directory_says_what_to_do(tmp_path: Path) -> None:
    save_file({"base.lora_A.weight": torch.ones(2, 8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"adapter_config\.json beside"):
        open_source(tmp_path)


@pytest.mark.parametrize("thing", [3, None, [torch.ones(2)], {"a": 3}, {}, {"a": torch.ones(2, 2, device="meta")}])
def test_what_is_no_model_is_bad_input(thing: object) -> None:
    with pytest.raises(BadInput):
        open_source(thing)  # type: ignore[arg-type]


class Canary:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickles_need_permission_and_run_no_code(tmp_path: Path, model: nn.Module) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(BadInput, match="allow_pickle"):
        open_source(directory)
    assert open_source(directory, allow_pickle=True).weights_sha256() == open_source(model).weights_sha256()
    canary = tmp_path / "canary"
    torch.save({"w": Canary(canary)}, directory / "pytorch_model.bin")
    with pytest.raises(BadInput, match="not a plain state dict"):
        open_source(directory, allow_pickle=True)
    assert not canary.exists()


def test_a_hub_id_is_read_from_the_local_cache(directory: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--org--tiny"
    snapshot = home / "snapshots" / commit
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(directory.iterdir())):
        (home / "blobs" / f"{i:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:040x}")
    code = (
        "import json; from htsr.errors import NotFound; from htsr.model.open import open_source\n"
        "s = open_source('org/tiny'); found = [s.id, s.revision, s.weights_sha256(), s.config is not None]\n"
        "found.append(open_source('org/tiny', revision=s.revision).revision)\n"
        "for other in ('org/other', 'other'):\n"
        "    try: open_source(other)\n"
        "    except NotFound as error: found.append(str(error))\n"
        "print(json.dumps(found))"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    id_, revision, digest, config, again, *errors = json.loads(done.stdout)
    assert (id_, revision, config, again) == ("org/tiny", commit, True, commit)
    assert digest == open_source(directory).weights_sha256()
    assert len(errors) == 2
    assert all("HF_HUB_OFFLINE" in error for error in errors)
    blob = (snapshot / "model.safetensors").resolve()
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(blob.read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    with pytest.raises(BadInput, match="out of the model's directory"):
        open_source(snapshot)


def test_hub_failure_online_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(name: str, *, local_files_only: bool = False, **_: object) -> str:
        raise LocalEntryNotFoundError("not here") if local_files_only else ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(NotFound, match="no route to host"):
        open_source("org/unknown")


def test_every_info_knows_its_bytes() -> None:
    source = open_source({"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.int64)})
    assert [(t.numel, t.num_bytes, t.readable) for t in source.tensors] == [(12, 24, True), (2, 16, False)]
    with pytest.raises(NotFound, match="tensor name"):
        source.info("c")


def test_a_module_of_another_library_with_a_config_object_is_no_surprise() -> None:
    module = nn.Linear(8, 8)
    module.config = SimpleNamespace(hidden=8)  # type: ignore[assignment]
    assert open_source(module).config is None
