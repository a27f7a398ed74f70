"""What `test_streaming` shows with a fake device, on a real one: `pytest -m gpu` on a machine with CUDA."""

from contextlib import contextmanager

import pytest
import torch
from makers import tiny_llama
from streaming import SHAPES, Resident, Streamed, batches, maker, pair, same_bits

from owlore.kernels import nf4
from owlore.residency.formats import FORMATS
from owlore.residency.pinned import HostBlob, host_memory, pin, unlocked
from owlore.residency.ports import CudaPort

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def same_sums_each_time(monkeypatch):
    """Bits are compared, so sums have to be made in one order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def wide_llama():
    """Blocks of 25 MB in fp32, so that a copy and a visit take long enough to overlap."""
    return tiny_llama(blocks=8, width=1024, heads=8, kv_heads=8, hidden=2048).train()


def agree(make, draws, *, parts=2, **settings):
    resident, streamed = pair(lambda: make().to(CUDA), landing="cuda", pin=settings.pop("pin", pin), **settings)
    for draw in draws:
        for side in (resident, streamed):
            side.draw(draw)
        for step in range(3):
            losses = [side.take_step(batches(parts, seed=step)) for side in (resident, streamed)]
            assert torch.equal(*losses) and same_bits(resident, streamed), (draw, step)
    for block in streamed.units.blocks:
        for name, _ in block:
            exact = streamed.residency.exact(name)
            assert torch.equal(exact.to(CUDA), resident.optimizer.parameters[name])
    return streamed


@pytest.mark.parametrize("family", SHAPES)
def test_every_gradient_of_three_steps_is_the_resident_models(family):
    streamed = agree(lambda: maker(family), [(0,), (1, 2)])
    assert streamed.port.loads >= 3


SETTINGS = {
    "two slots": {},
    "four slots": {"slots": 4},
    "boundaries travel": {"offload": True},
    "a share resident": {"resident": (6, 7)},
    "memory that is not locked": {"pin": unlocked},
    "trained ends": {"groups": ("embeddings", "norm", "head"), "rank": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_that_overlap_with_the_compute_change_no_bit(name):
    agree(wide_llama, [(6,), (0, 3), (7,), (1, 2)], **SETTINGS[name])


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_format_is_a_resident_model_quantised_by_hand(form):
    model = wide_llama().to(CUDA)
    streamed = Streamed(model, landing="cuda", pin=pin, form=form, offload=True)
    streamed.draw((3, 5))
    by_hand = wide_llama().to(CUDA)
    resident = Resident(by_hand)
    packed = FORMATS[form]
    for index, block in enumerate(resident.units.modules):
        for module in block.modules() if index not in (3, 5) else ():
            if isinstance(module, torch.nn.Linear):
                held = packed.pack(module.weight.data)
                module.weight.data = packed.dense(held, tuple(module.weight.shape), module.weight.dtype)
    resident.draw((3, 5))
    for step in range(3):
        losses = [side.take_step(batches(2, seed=step)) for side in (resident, streamed)]
        assert torch.equal(*losses) and same_bits(resident, streamed)


def test_nf4_is_the_same_with_and_without_bitsandbytes():
    fast = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(384, 1000, device=CUDA)
    held = FORMATS["nf4"].pack(weight)
    plain = nf4.dequantise(nf4.Nf4(shape=tuple(weight.shape), block=64, **held), torch.float32)
    assert torch.equal(FORMATS["nf4"].dense(held, tuple(weight.shape), torch.float32), plain)
    codes, state = fast.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    single = nf4.quantise(weight, double=False)
    assert torch.equal(codes.flatten(), single.packed) and torch.equal(state.absmax, single.absmax)


def test_a_copy_waits_for_its_ticket_and_the_compute_for_the_copy():
    port = CudaPort(CUDA)
    size = 1 << 24
    blob = pin(host_memory(size))
    assert blob.pinned
    blob.tensor.fill_(7)
    into, seen = port.buffer(size), torch.empty(size, dtype=torch.uint8, device=CUDA)
    into.fill_(1)
    torch.cuda._sleep(200_000_000)
    seen.copy_(into)  # the compute still reads the old bytes
    ticket = port.load(into, blob, port.mark())
    port.wait(ticket)
    after = into.clone()
    assert bool((seen == 1).all()) and bool((after == 7).all())
    home = host_memory(size)
    home.fill_(0)
    torch.cuda._sleep(200_000_000)
    after.fill_(9)
    port.wait(port.unload(pin(home).tensor, after))
    torch.cuda.synchronize()
    assert bool((home == 9).all())
    staged = port.load(into, HostBlob(torch.full((size,), 3, dtype=torch.uint8), False), port.mark())
    port.wait(staged)
    assert bool((into == 3).all())


@contextmanager
def nobody_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", [{}, {"form": "nf4"}, {"offload": True}, {"rank": 8}], ids=str)
def test_the_host_never_waits_for_the_device_inside_a_step(settings):
    streamed = Streamed(wide_llama().to(CUDA), landing="cuda", pin=pin, **settings)
    streamed.watches = False
    streamed.draw((2, 6))
    parts = batches(2)
    for _ in range(2):
        streamed.take_step(parts)
    with nobody_waits():
        streamed.take_step(parts)


def test_nor_in_a_step_of_a_resident_model():
    resident = Resident(wide_llama().to(CUDA), rank=8)
    resident.watches = False
    resident.draw((2, 6))
    parts = batches(2)
    for _ in range(2):
        resident.take_step(parts)
    with nobody_waits():
        resident.take_step(parts)
