"""Host memory of a run from files: the store, what was trained, and a few blocks, while it loads and while it exports.

Living bytes are counted, not measured: the distinct storages behind every tensor that Python holds, whichever thread
made it.
"""

import gc

import pytest
import torch
from makers import byte_tokenizer, tiny_llama
from torch import nn

import owlore
from htsr.model.safetensors_files import SafetensorsSource
from owlore.io import checkpoint, export_files, safetensors_writer
from owlore.residency.store import Store
from owlore.training.streamed import StreamedBackend

BLOCKS = 16
ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abc" for b in "mn"]
SETTINGS = {"steps": 3, "every": 1, "active": 2, "rank": 4, "batch": 1, "lr": 5e-3, "table": "uniform", "seed": 3,
            "weights": "bf16-sr"}  # fmt: skip


def living():
    """Bytes of the distinct storages behind all tensors on the CPU that were made since `gc.freeze`."""
    held = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage.nbytes()
    return sum(held.values())


@pytest.fixture
def watched(monkeypatch):
    """phase -> most bytes that lived at any read of a file or write of a tensor in it, beyond what lived before."""
    phase, most = ["load"], {}
    tiny_llama(blocks=1)  # imports what a model needs
    gc.collect()
    gc.freeze()  # what lives now is no longer listed: quicker, and not to be counted

    def look():
        most[phase[0]] = max(most.get(phase[0], 0), living())

    def counting(function):
        def run(self, name, *args):
            out = function(self, name, *args)
            look()
            return out

        return run

    def writing(tensor):
        look()
        yield from pieces(tensor)

    def staged(name, function):
        def run(*args, **settings):
            phase[0], earlier = name, phase[0]
            try:
                return function(*args, **settings)
            finally:
                phase[0] = earlier

        return run

    pieces = safetensors_writer.pieces
    monkeypatch.setattr(SafetensorsSource, "rows", counting(SafetensorsSource.rows))
    monkeypatch.setattr(Store, "fill", counting(Store.fill))
    for module in (export_files, checkpoint):
        monkeypatch.setattr(module, "pieces", writing)
    connect = StreamedBackend.connect

    def connected(self, *given, **named):
        connect(self, *given, **named)
        phase[0] = "train"

    monkeypatch.setattr(StreamedBackend, "connect", connected)
    monkeypatch.setattr("owlore.run.lifecycle.export_files", staged("export", export_files.export_files))
    monkeypatch.setattr("owlore.training.trainer.checkpoint.save", staged("checkpoint", checkpoint.save))
    yield most
    gc.unfreeze()


@pytest.mark.parametrize("overlay", ["memory", "disk"])
@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
def test_loading_and_exporting_hold_the_store_what_was_trained_and_two_blocks(
    tmp_path, frozen, overlay, watched, monkeypatch
):
    model = tiny_llama(blocks=BLOCKS, width=64, hidden=160, dtype=torch.bfloat16)
    block = sum(p.numel() * 2 for p in model.model.layers[0].parameters())
    outside = sum(p.numel() * 2 for n, p in model.named_parameters() if "layers" not in n)
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    byte_tokenizer(64).save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 5
    del model
    gc.collect()
    if overlay == "disk":
        monkeypatch.setattr("owlore.training.streamed.available_memory", lambda: 0)
    run = owlore.train(tmp_path / "model", ROWS, out=tmp_path / "run", residency="host", frozen=frozen, **SETTINGS)
    record = run.record["residency"]
    drawn = len({b for blocks in run.history["active_blocks"] for b in blocks})
    assert 3 <= drawn <= 6
    trained = drawn * block if frozen == "nf4" and overlay == "memory" else 0
    assert record["host_bytes"]["overlay"] == trained
    store, slots = record["host_bytes"]["store"], record["device_bytes"]["slots"]
    assert store == pytest.approx(BLOCKS * block * (1 if frozen == "bf16" else 0.318), rel=0.01)
    small = 100_000  # data, buffers, what the optimizer counts with
    allowed = store + slots + outside + 2 * block + small
    assert allowed < BLOCKS * block * (1.4 if frozen == "bf16" else 0.7)
    assert 0 < watched["load"] <= allowed
    assert 0 < watched["export"] <= allowed + trained
    # While a checkpoint is written drawn blocks, those that are read ahead and what the update keeps are alive too.
    assert 0 < watched["checkpoint"] <= allowed + trained + 6 * block
