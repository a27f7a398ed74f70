"""Free memory is given back while a step runs on the CPU, and only then."""

import pytest
import torch
from makers import tiny_llama

from owlore.activations import malloc_trim
from owlore.activations.malloc_trim import trimmed_heap

CPU = torch.device("cpu")
glibc = pytest.mark.skipif(
    malloc_trim._trimmer() is None, reason="the C library has no malloc_trim, or there is no /proc"
)


@glibc
def test_holes_between_living_tensors_are_given_back():
    tensors = [torch.ones(100_000 // 4) for _ in range(1500)]  # small enough to lie in the heap in any case
    full = malloc_trim._resident()
    tensors = tensors[::2]
    with trimmed_heap((), CPU):  # trims once when it begins
        assert malloc_trim._resident() < full - 40e6
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_the_heap_is_looked_through_when_memory_has_grown_and_in_backward_too(monkeypatch):
    held, trims = [0], []

    def trim(pad):
        trims.append(held[0])
        held[0] = 10

    monkeypatch.setattr(malloc_trim, "_trimmer", lambda: trim)
    monkeypatch.setattr(malloc_trim, "_resident", lambda: held[0])
    monkeypatch.setattr(malloc_trim, "GROWTH", 100)
    model = tiny_llama(blocks=6)
    model.get_input_embeddings().weight.requires_grad_(False)
    blocks = model.model.layers
    growth = [block.register_forward_hook(lambda *_: held.__setitem__(0, held[0] + 40)) for block in blocks]
    with trimmed_heap(blocks, CPU):
        loss = model(input_ids=torch.arange(8)[None]).logits.sum()
        assert trims == [0, 130, 130]  # at the start, then after every third block: 10 + 3 * 40 > 10 + 100
        held[0] = 500
        loss.backward()
        assert trims == [0, 130, 130, 500]
    for handle in growth:
        handle.remove()
    assert not any(block._forward_hooks for block in blocks)


def test_nothing_happens_on_another_device_or_without_glibc(monkeypatch):
    blocks = tiny_llama(blocks=2).model.layers
    with trimmed_heap(blocks, torch.device("cuda")):
        assert not any(block._forward_hooks for block in blocks)
    monkeypatch.setattr(malloc_trim, "_trimmer", lambda: None)
    with trimmed_heap(blocks, CPU):
        assert not any(block._forward_hooks for block in blocks)
