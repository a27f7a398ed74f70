"""Layouts, stores, exact weights and their overlay, pinned memory and the staging buffers."""

import gc
import threading

import pytest
import torch
from makers import generator, save_tiny
from streaming import Resident, Streamed, batches, deep_llama, same_bits
from torch import nn

from owlore.kernels import int8, nf4
from owlore.residency.binding import layout_of
from owlore.residency.exact_weights import FileExactWeights, Overlay
from owlore.residency.formats import FORMATS
from owlore.residency.pinned import locked_bytes, pageable, pin
from owlore.residency.placement import Placement
from owlore.residency.staging import Staging
from owlore.residency.store import Store

CPU = torch.device("cpu")


def block(seed=0, dtype=torch.float32):
    return deep_llama(2, seed=seed, dtype=dtype).model.layers[seed % 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_a_blob_gives_back_what_its_format_makes_of_the_weights(form, dtype):
    module = block(dtype=dtype)
    layout = layout_of(module, FORMATS[form])
    blob = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.fill(blob, dict(module.named_parameters()), CPU)
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    for weight in layout.weights:
        W = dict(module.named_parameters())[weight.name].detach()
        dense = weight.form.dense(layout.views(blob)[weight.name], weight.shape, weight.dtype)
        if form == "bf16" or id(dict(module.named_parameters())[weight.name]) not in matrices:
            expected = W
        else:
            expected = nf4.dequantise(nf4.quantise(W), dtype) if form == "nf4" else int8.dequantise(
                *int8.quantise(W), dtype)  # fmt: skip
        assert dense.dtype == dtype and torch.equal(dense, expected), weight.name
    assert all(piece.offset % 256 == 0 for piece in layout.pieces)


def test_bytes_a_parameter_are_the_references():
    """Reference, section 4: an 8B block is 436 / 220 / 113 MB in bf16, int8 and NF4 (0.516 bytes a parameter)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        module = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    sizes = {form: layout_of(module, FORMATS[form]).num_bytes / 1e6 for form in FORMATS}
    assert sizes == pytest.approx({"bf16": 436, "int8": 218.5, "nf4": 112.6}, rel=5e-3)


def filled(form="nf4", pin=pageable, seeds=(0, 1)):
    modules = [block(seed) for seed in seeds]
    store = Store([layout_of(m, FORMATS[form]) for m in modules], device=CPU, resident=(), pin=pin)
    for index, module in enumerate(modules):
        store.fill(index, dict(module.named_parameters()))
    return store


def test_where_locking_is_refused_blocks_are_pageable_and_counted():
    asked = []

    def refuse(num_bytes):
        asked.append(num_bytes)
        return pageable(num_bytes)

    store = filled("bf16", refuse)
    assert asked == [layout.num_bytes for layout in store.layouts]
    assert store.num_pageable() == 2 and store.pinned_bytes() == 0
    resident, streamed = Resident(deep_llama(4)), Streamed(deep_llama(4), pin=refuse)
    for side in (resident, streamed):
        side.draw((1,))
        side.take_step(batches())
    assert same_bits(resident, streamed)


def test_a_run_whose_memory_cannot_be_locked_says_so(tmp_path):
    from owlore.blocks import find_parts
    from owlore.models.loading import load
    from owlore.patches import PatchStack
    from owlore.training.streamed import open_streamed_backend

    directory = save_tiny(tmp_path / "model", blocks=3)
    loaded = load(str(directory), dtype="auto", attn="sdpa", device=CPU)
    said = []
    open_streamed_backend(Placement(residency="host"), find_parts(loaded.model), loaded, always_on=(), device=CPU,
                          directory=tmp_path, notify=said.append, patches=PatchStack(),
                          pin_memory=lambda size: pageable(size))  # fmt: skip
    assert len(said) == 1 and "3 blocks could not be page-locked" in said[0] and "pageable" in said[0]


def test_locked_memory_is_whole_pages():
    assert locked_bytes(436_224_000) == 436_224_000 // 4096 * 4096 + 4096 * (436_224_000 % 4096 > 0)


def test_host_memory_begins_on_a_page_of_its_own():
    parts = [pageable(size).tensor for size in (1, 4096, 5000)]
    assert [p.numel() for p in parts] == [1, 4096, 5000] and all(p.data_ptr() % 4096 == 0 for p in parts)
    parts[2].fill_(7)
    assert parts[1].sum() == 0 and int(parts[2].sum()) == 35000


class Driver:
    """Takes note of what is locked; `refuses` says whether it does so."""

    def __init__(self, refuses=False):
        self.locked, self.unlocked, self.refuses = {}, [], refuses

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802
        if not self.refuses:
            self.locked[address] = num_bytes
        return int(self.refuses)

    def cudaHostUnregister(self, address):  # noqa: N802
        self.unlocked.append((address, self.locked.pop(address)))
        return 0


def test_locked_pages_are_unlocked_once_when_the_last_view_of_them_goes(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    blob = pin(5000)
    view = blob.tensor[100:200].view(torch.int32)
    address = blob.tensor.data_ptr()
    assert blob.pinned and driver.locked == {address: 8192}
    del blob
    gc.collect()
    assert not driver.unlocked
    del view
    gc.collect()
    assert driver.unlocked == [(address, 8192)] and not driver.locked


def test_pages_that_could_not_be_locked_are_not_unlocked(monkeypatch):
    driver = Driver(refuses=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr("owlore.residency.pinned._clear_cuda_error", lambda: None)
    blob = pin(10)
    assert not blob.pinned
    del blob
    gc.collect()
    assert not driver.unlocked


class Late:
    """Reads the staged copy only in `synchronize`."""

    def __init__(self, staged, into):
        self.staged, self.into, self.lock, self.done = staged, into, threading.Lock(), False

    def synchronize(self):
        with self.lock:
            if not self.done:
                self.into.copy_(self.staged)
                self.done = True


def test_a_staging_buffer_is_never_overwritten_before_it_was_read():
    staging = Staging(2, pin=pageable)
    sources = [torch.randint(0, 255, (100 + 7 * i,), dtype=torch.uint8, generator=generator(i)) for i in range(9)]
    into = [torch.zeros_like(source) for source in sources]
    futures = [staging.submit(s, lambda staged, i=i: Late(staged, into[i])) for i, s in enumerate(sources)]
    for future in futures:
        future.result().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sources, into, strict=True))


@pytest.mark.parametrize("share", [(0.0, []), (0.25, [9, 10, 11]), (0.5, [6, 7, 8, 9, 10, 11])])
def test_the_share_that_stays_is_the_top_blocks(share):
    assert list(Placement(residency="host", resident_share=share[0]).resident_blocks(12)) == share[1]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_exact_weights_come_from_the_file_until_a_block_was_trained_and_then_from_the_overlay(kind, tmp_path):
    file = {f"b{b}.w": torch.randn(3, 4, generator=generator(b)).to(torch.bfloat16) for b in range(3)}
    reads = []

    def read(name):
        reads.append(name)
        return file[name]

    overlay = Overlay(tmp_path / "overlay" if kind == "file" else None)
    weights = FileExactWeights(read, [{"w": (f"b{b}.w", torch.float32)} for b in range(3)], overlay)
    weights.prefetch([1, 2])
    assert torch.equal(weights.read(1)["w"], file["b1.w"].float())
    trained = torch.randn(3, 4, generator=generator(9))
    weights.write(1, {"w": trained})
    expected = trained.clone()
    trained.zero_()  # the caller's tensor is not the overlay's
    reads.clear()
    assert torch.equal(weights.read(1)["w"], expected) and "b1.w" not in reads
    weights.prefetch([1])
    assert torch.equal(weights.read(0)["w"], file["b0.w"].float()) and "b0.w" in reads
    assert (overlay.num_bytes() == 48) == (kind == "memory")
    assert (tmp_path / "overlay").is_dir() == (kind == "file")


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_drawn_block_trains_on_its_true_weights_and_nothing_drifts(form):
    """A resident model whose frozen blocks are quantised by hand from exact weights at every switch."""
    resident, streamed = Resident(deep_llama(5), rank=4), Streamed(deep_llama(5), rank=4, form=form)
    exact = {name: p.detach().clone() for name, p in resident.model.named_parameters()}
    block_of = resident.parts.block_of()

    def by_hand():
        for name, parameter in resident.model.named_parameters():
            W = exact[name]
            if parameter.ndim == 2 and name in block_of and block_of[name] not in resident.active:
                W = nf4.dequantise(nf4.quantise(W), W.dtype) if form == "nf4" else int8.dequantise(
                    *int8.quantise(W), W.dtype)  # fmt: skip
            parameter.data.copy_(W)

    resident.backend.set_active = lambda rules: by_hand()
    for draw in ((1, 3), (0, 1), (2,), (1, 3), (4,)):
        for name, parameter in resident.model.named_parameters():
            if block_of.get(name) in resident.active:
                exact[name] = parameter.detach().clone()
        for side in (resident, streamed):
            side.draw(draw)
        for step in range(2):
            given = batches(2, seed=step)
            assert torch.equal(*(side.take_step(given) for side in (resident, streamed)))
            assert same_bits(resident, streamed)
    for name in exact:
        if name in block_of and block_of[name] != 4:
            assert torch.equal(streamed.residency.values([name])[name], exact[name]), name


def test_exact_weights_that_the_checkpoint_holds_are_not_held_twice():
    source = {name: p.detach().clone() for name, p in deep_llama(4).named_parameters()}
    source["model.layers.2.mlp.up_proj.weight"] = source["model.layers.2.mlp.up_proj.weight"] + 1  # other bits
    streamed = Streamed(deep_llama(4), form="nf4", read=source.__getitem__)
    assert streamed.num_kept == 1 and 2 in streamed.overlay and 1 not in streamed.overlay
