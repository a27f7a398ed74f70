"""What `test_streaming` shows with a fake device, on a real one: `pytest -m gpu` on a machine with CUDA."""

from contextlib import contextmanager

import pytest
import torch
from makers import save_tiny, tiny_llama
from safetensors.torch import load_file
from streaming import SHAPES, Resident, Streamed, batches, maker, pair, quantised_by_hand, same_bits

import owlore
from owlore.kernels import nf4
from owlore.residency.copy_queue import CudaCopyQueue
from owlore.residency.formats import FORMATS
from owlore.residency.pinned import HostBlob, pageable, pin

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
    resident, streamed = pair(lambda: make().to(CUDA), landing="real", pin=settings.pop("pin", pin), **settings)
    for draw in draws:
        for side in (resident, streamed):
            side.draw(draw)
        for step in range(3):
            losses = [side.take_step(batches(parts, seed=step)) for side in (resident, streamed)]
            assert torch.equal(*losses) and same_bits(resident, streamed), (draw, step)
    for block in streamed.parts.blocks:
        for name, _ in block:
            (exact,) = streamed.residency.values([name]).values()
            assert torch.equal(exact.to(CUDA), resident.optimizer.parameters[name])
    return streamed


@pytest.mark.parametrize("family", SHAPES)
def test_every_gradient_of_three_steps_is_the_resident_models(family):
    streamed = agree(lambda: maker(family), [(0,), (1, 2)])
    assert streamed.copy_queue.loads >= 3


SETTINGS = {
    "two buffers": {},
    "four buffers": {"num_buffers": 4},
    "boundaries travel": {"offload": True},
    "a share resident": {"resident": (6, 7)},
    "memory that is not locked": {"pin": pageable},
    "trained ends": {"groups": ("embeddings", "norm", "head"), "rank": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_that_overlap_with_the_compute_change_no_bit(name):
    agree(wide_llama, [(6,), (0, 3), (7,), (1, 2)], **SETTINGS[name])


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_format_is_a_resident_model_quantised_by_hand(form):
    model = wide_llama().to(CUDA)
    streamed = Streamed(model, landing="real", pin=pin, form=form, offload=True)
    streamed.draw((3, 5))
    by_hand = wide_llama().to(CUDA)
    resident = Resident(by_hand)
    quantised_by_hand(by_hand, form, keep=(3, 5))
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


def test_a_copy_waits_for_its_event_and_the_compute_for_the_copy():
    queue = CudaCopyQueue(CUDA)
    size = 1 << 24
    blob = pin(size)
    assert blob.pinned
    blob.tensor.fill_(7)
    target, seen = queue.allocate(size), torch.empty(size, dtype=torch.uint8, device=CUDA)
    target.fill_(1)
    torch.cuda._sleep(200_000_000)
    seen.copy_(target)  # the compute still reads the old bytes
    event = queue.load(target, blob, queue.record_event())
    queue.wait_event(event)
    after = target.clone()
    assert bool((seen == 1).all()) and bool((after == 7).all())
    host = pin(size).tensor
    host.fill_(0)
    torch.cuda._sleep(200_000_000)
    after.fill_(9)
    queue.wait_event(queue.unload(host, after))
    torch.cuda.synchronize()
    assert bool((host == 9).all())
    staged = queue.load(target, HostBlob(torch.full((size,), 3, dtype=torch.uint8), False), queue.record_event())
    queue.wait_event(staged)
    assert bool((target == 3).all())


def test_locked_memory_that_is_given_back_leaves_nothing_locked_at_its_address():
    size = 1 << 22
    for _ in range(50):  # the kernel gives addresses out again, larger ones among them
        first = pin(size)
        assert first.pinned
        del first
        second = pin(3 * size)
        assert second.pinned
        plain = torch.full((5 * size,), 4, dtype=torch.uint8)
        assert bool((plain.to(CUDA) == 4).all()) and bool((second.tensor.to(CUDA) == 0).all())
        del second


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEPS = {
    "streamed": lambda model: Streamed(model, landing="real", pin=pin),
    "streamed, nf4": lambda model: Streamed(model, landing="real", pin=pin, form="nf4"),
    "streamed, offloaded": lambda model: Streamed(model, landing="real", pin=pin, offload=True),
    "streamed, projected": lambda model: Streamed(model, landing="real", pin=pin, rank=8, in_products=True),
    "resident, projected": lambda model: Resident(model, rank=8, in_products=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits_for_the_device_inside_a_step_that_finds_no_basis(name):
    side = STEPS[name](wide_llama().to(CUDA))
    side.watches = False
    side.draw((2, 6))
    parts = batches(2)
    for _ in range(2):
        side.take_step(parts)
    with waiting_is_an_error():
        side.take_step(parts)


ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
RUN = {"steps": 12, "batch": 2, "accum": 2, "lr": 5e-3, "eval_data": 0.2, "seed": 3, "device": "cuda",
       "attn": "eager", "schedule": "constant"}  # fmt: skip
SAMPLED = {"every": 4, "active": 2, "rank": 4, "table": "uniform"}
METHODS = {"owlore": SAMPLED, "full": {}, "lora": {}, "smt": {}, "dota": {}}


def weights_of(run):
    (file,) = run.directory.glob("*/*model.safetensors")
    return load_file(file)


def same(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("extra", [{}, {"offload_activations": True}, {"resident_share": 0.34}], ids=str)
def test_a_run_with_blocks_in_host_memory_is_the_resident_one_bit_for_bit(tmp_path, extra):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=5, dtype=torch.bfloat16))
    plain = owlore.train(model, ROWS, out=tmp_path / "device", **RUN, **SAMPLED)
    host = owlore.train(model, ROWS, out=tmp_path / "host", residency="host", **extra, **RUN, **SAMPLED)
    assert plain.record["device"].startswith("cuda") and plain.record["peak_bytes"] > 0
    assert plain.history["loss"].tolist() == host.history["loss"].tolist()
    assert same(weights_of(plain), weights_of(host))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_where_attention_adds_in_one_order(tmp_path, method):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=4, dtype=torch.bfloat16))
    settings = {**RUN, "method": method, **METHODS[method]}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    owlore.train(model, ROWS, out=tmp_path / "run", **{**settings, "steps": 6})
    longer = owlore.train(model, ROWS, out=tmp_path / "run", resume=True, **settings)
    assert same(weights_of(whole), weights_of(longer))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_float32_has_the_losses_of_the_same_run_on_a_cpu(tmp_path, method):
    model = save_tiny(tmp_path / "model", tiny_llama(blocks=4))
    settings = {**RUN, "method": method, "dtype": "float32", **METHODS[method]}
    there = owlore.train(model, ROWS, out=tmp_path / "gpu", **settings)
    here = owlore.train(model, ROWS, out=tmp_path / "cpu", **{**settings, "device": "cpu"})
    assert there.history["loss"].tolist() == pytest.approx(here.history["loss"].tolist(), rel=2e-2)
    assert there.history["loss"].iloc[1] == pytest.approx(here.history["loss"].iloc[1], rel=1e-5)
