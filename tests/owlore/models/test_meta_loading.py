"""Models whose blocks stay in their files: loaded, trained and exported as those that are read as a whole."""

import json
import shutil

import pytest
import torch
from makers import byte_tokenizer, save_tiny, tiny_llama, tiny_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import owlore
from htsr.model.open import open_source
from htsr.model.skeleton import CannotStreamError
from owlore.blocks import find_parts
from owlore.io.safetensors_writer import aligned, outline, pieces, write_tensors
from owlore.models.loading import load
from owlore.models.meta_loading import open_on_meta

CPU = torch.device("cpu")
ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
SETTINGS = {"steps": 6, "every": 3, "active": 2, "rank": 4, "batch": 2, "lr": 5e-3, "table": "uniform", "seed": 3}


def loaded_both_ways(directory, dtype="auto"):
    said = []
    whole = load(str(directory), dtype=dtype, attn="sdpa", device=CPU)
    return whole, load(str(directory), dtype=dtype, attn="sdpa", device=CPU, leave=said.append), said


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("family", sorted(tiny_models().keys() - {"gpt-neox"}))  # its files have another head's name
def test_what_is_left_in_the_files_is_what_the_whole_model_has(tmp_path, family, dtype):
    directory = save_tiny(tmp_path, tiny_models()[family]().to(torch.bfloat16))
    whole, left, said = loaded_both_ways(directory, dtype)
    assert not said and type(left.model) is type(whole.model) and not left.model.training
    ours, theirs = (dict(x.model.named_parameters()) for x in (left, whole))
    assert list(ours) == list(theirs) and left.origins.keys() == ours.keys()
    inside = find_parts(left.model).block_of()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype and ours[name].shape == parameter.shape
        if name in inside:
            assert ours[name].untyped_storage().nbytes() == parameter.element_size() and ours[name].isnan().all()
            assert torch.equal(left.source.read(left.origins[name]).to(parameter.dtype), parameter)
        else:
            assert torch.equal(ours[name], parameter)
    mine, own = (dict(x.model.named_buffers()) for x in (left, whole))
    assert mine.keys() == own.keys()
    assert all(mine[n].dtype == own[n].dtype and torch.equal(mine[n], own[n]) for n in own)
    assert left.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert left.stored == whole.stored and left.stored_default == whole.stored_default
    tied = [len({id(p) for p in x.model.parameters()}) for x in (left, whole)]
    assert tied[0] == tied[1]


def sharded(directory, model, size="20KB"):
    model.save_pretrained(directory, max_shard_size=size)
    byte_tokenizer(model.config.vocab_size).save_pretrained(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 4
    return directory


def headers(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.name] = {n: (opened.get_slice(n).get_dtype(), opened.get_slice(n).get_shape()) for n in opened.keys()}  # fmt: skip # noqa: E501, SIM118
    return found


@pytest.mark.parametrize("extra", [{"residency": "host"}, {"residency": "host", "frozen": "nf4"}, {"frozen": "int8"}],
                         ids=["host", "host nf4", "int8"])  # fmt: skip
@pytest.mark.parametrize("always_on", [(), ("embeddings",)], ids=["blocks", "embeddings"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_export_has_the_shards_names_index_and_bits_and_trained_values_as_a_whole_one(
    tmp_path, extra, always_on, tied
):
    model = sharded(tmp_path / "model", tiny_llama(blocks=6, dtype=torch.bfloat16, tied=tied))
    memory = load(str(model), dtype="auto", attn="sdpa", device=CPU)
    settings = {**SETTINGS, **extra, "always_on": always_on}
    run = owlore.train(model, ROWS, out=tmp_path / "run", **settings)
    exported = run.directory / "model"
    whole = owlore.train(memory.model, ROWS, tokenizer=memory.tokenizer, out=tmp_path / "whole", **settings)
    index = "model.safetensors.index.json"
    assert (exported / index).read_bytes() == (model / index).read_bytes()
    assert headers(exported) == headers(model)
    original, ours = ({n: t for f in headers(d) for n, t in load_file(d / f).items()} for d in (model, exported))
    theirs = load_file(whole.directory / "model/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    changed = {name for name in ours if not torch.equal(ours[name], original[name])}
    drawn = {block for blocks in run.history["active_blocks"] for block in blocks}
    assert {int(n.split(".")[2]) for n in changed if "layers" in n} == drawn and len(drawn) < 6
    assert ("model.embed_tokens.weight" in changed) == bool(always_on)
    described = [json.loads((d / "model" / name).read_text()) for d in (run.directory, whole.directory)
                 for name in ("config.json", "generation_config.json")]  # fmt: skip
    assert described[0] == described[2] and described[1] == described[3]
    state = run.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_files_of_the_hubs_cache_are_exported_under_the_names_of_their_links(tmp_path):
    plain = sharded(tmp_path / "plain", tiny_llama(blocks=6))
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(blobs / f"{number:040x}")
    run = owlore.train(snapshot, ROWS, out=tmp_path / "run", residency="host", **{**SETTINGS, "steps": 1})
    exported = run.directory / "model"
    assert headers(exported) == headers(plain) and not any(path.is_symlink() for path in exported.iterdir())
    assert (exported / "model.safetensors.index.json").is_file()


def test_a_stored_copy_of_tied_weights_follows_what_is_trained(tmp_path):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=4, tied=True))
    stored = load_file(model / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    run = owlore.train(model, ROWS, out=tmp_path / "run", residency="host", always_on=("head",), **SETTINGS)
    after = load_file(run.directory / "model/model.safetensors")
    assert after.keys() == stored.keys()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], stored["lm_head.weight"])


def test_what_cannot_stay_in_its_files_is_read_as_a_whole_and_that_is_said(tmp_path, capsys):
    directory = save_tiny(tmp_path / "model", tiny_llama(blocks=3))
    _, _, said = loaded_both_ways(directory)
    assert said == []
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    )
    whole, left, said = loaded_both_ways(save_tiny(tmp_path / "mixture", mixture))  # its files have other names
    assert len(said) == 1 and "no tensor for model.layers.0.mlp." in said[0]
    assert not left.origins and left.model.state_dict().keys() == whole.model.state_dict().keys()
    said.clear()
    load(whole.model, dtype="auto", attn="sdpa", device=CPU, tokenizer=whole.tokenizer, leave=said.append)
    assert len(said) == 1 and "in memory" in said[0]


def test_only_plain_safetensors_can_be_left_in_their_files(tmp_path):
    """GGUF, say; the source of a module stands for every other one here. Nor can weights that are stored quantised."""
    directory = save_tiny(tmp_path / "model", tiny_llama(blocks=3))
    with pytest.raises(CannotStreamError, match="not plain safetensors"):
        open_on_meta(open_source(tiny_llama(blocks=3)), directory, dtype=None, attn={})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CannotStreamError, match="stored quantised"):
        open_on_meta(open_source(directory), directory, dtype=None, attn={})


def test_a_file_written_a_tensor_at_a_time_is_safetensors(tmp_path):
    stream = torch.Generator().manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5, generator=stream).to(torch.bfloat16), "a.wide": torch.randn(4, generator=stream),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8),
        "turned": torch.randn(4, 6, generator=stream).T,
    }  # fmt: skip
    outlines = aligned({name: outline(tensor) for name, tensor in tensors.items()})
    path = tmp_path / "x.safetensors"
    write_tensors(path, outlines, lambda name: pieces(tensors[name]), {"format": "pt"})
    again = load_file(path)
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert {t.name for t in open_source(path).tensors} == tensors.keys()
    with pytest.raises(ValueError, match=r"b\.half: got 4 bytes, expected 30"):
        write_tensors(path, outlines, lambda name: pieces(tensors["bytes"][:4] if name == "b.half" else tensors[name]))
