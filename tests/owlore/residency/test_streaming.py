"""Streamed blocks compute what resident blocks compute, bit for bit, and no weights outlive their lease."""

import gc
import itertools
import time
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from makers import tiny_models
from streaming import SHAPES, Streamed, batches, deep_llama, maker, pair, quantised_by_hand, same_bits
from torch import nn

from htsr.errors import NotFinite
from owlore.residency.formats import FORMATS
from owlore.residency.residency import Residency
from owlore.residency.visits import loads_of_step, step_visits

LANDINGS = ("eager", "late", "random")
EVERYWHERE = [("llama", landing) for landing in LANDINGS] + [(family, "random") for family in SHAPES[1:]]


def steps_agree(resident, streamed, draws, *, parts=1, **options):
    """Three steps a draw: losses, every gradient, and at the end every trained parameter."""
    for draw in draws:
        resident.draw(draw)
        streamed.draw(draw)
        for step in range(3):
            given = batches(parts, seed=step)
            losses = [side.take_step(given, **options) for side in (resident, streamed)]
            if not (torch.equal(*losses) and same_bits(resident, streamed)):
                return False
    return all(
        torch.equal(streamed.residency.values([name])[name], resident.optimizer.parameters[name])
        for block in streamed.parts.blocks
        for name, _ in block
    )


@pytest.mark.parametrize(("family", "landing"), EVERYWHERE)
def test_logits_are_those_of_the_resident_model(family, landing):
    resident, streamed = pair(lambda: maker(family).eval(), landing=landing)
    ids = batches()[0].input_ids
    with torch.no_grad():
        assert torch.equal(resident.model(ids).logits, streamed.model(ids).logits)
    assert streamed.copy_queue.loads >= 3


@pytest.mark.parametrize(
    ("family", "landing"), [*EVERYWHERE, *((f, "random") for f in ("llama-tied", "gemma2", "phi", "gpt-neox"))]
)
def test_every_gradient_of_three_steps_is_the_resident_models(family, landing):
    resident, streamed = pair(lambda: maker(family), landing=landing)
    assert steps_agree(resident, streamed, [(0,), (1, 2)], parts=2)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_so_are_those_of_embeddings_norm_and_head(family):
    groups = ("embeddings", "norm", "head")
    resident, streamed = pair(lambda: maker(family), groups=groups, rank=4)
    assert steps_agree(resident, streamed, [(1,), (0, 2)], parts=2)
    assert {name for name, _, _ in streamed.gradients} >= set(streamed.parts.parameters((), groups))


def test_with_nothing_but_the_head_trained_backward_visits_no_block():
    resident, streamed = pair(lambda: deep_llama(4), groups=("norm", "head"))
    assert steps_agree(resident, streamed, [()])
    before = streamed.copy_queue.leases_seen
    streamed.take_step(batches())
    assert streamed.copy_queue.leases_seen - before == 4


def early(residency):
    """A visit that gives its lease back before the block is run: the bug that all of this is built to exclude."""

    @contextmanager
    def visit(block):
        bindings = residency.bindings[block]
        with Residency.visit(residency, block):
            held = {name: p.data for name, p in bindings.parameters.items()}
        if block not in residency.active:
            for name, parameter in bindings.parameters.items():
                parameter.data = held[name]
        yield

    return visit


@pytest.mark.parametrize("landing", LANDINGS)
def test_a_lease_given_back_too_early_does_not_go_unnoticed(landing):
    resident, streamed = pair(lambda: deep_llama(4), landing=landing)
    streamed.residency.visit = early(streamed.residency)
    try:
        agree = steps_agree(resident, streamed, [(1,)])
    except NotFinite:  # NaN was read where a block's weights should have been
        agree = False
    assert not agree


@pytest.mark.parametrize(("num_buffers", "landing"), [(2, "late"), (2, "random"), (3, "random"), (6, "late")])
def test_the_number_of_buffers_changes_no_bit(num_buffers, landing):
    resident, streamed = pair(lambda: deep_llama(6), num_buffers=num_buffers, landing=landing)
    assert steps_agree(resident, streamed, [(2, 3), (0, 5)], parts=2)
    assert len(streamed.residency.device_buffers.buffers) == num_buffers


SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(range(4), n)]


def test_every_drawn_set_of_four_blocks_agrees_and_follows_any_other():
    resident, streamed = pair(lambda: deep_llama(4))
    assert steps_agree(resident, streamed, SUBSETS)


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("drawn", [(0, 1), (3, 9), (11,), (10, 11)])
def test_loads_are_the_plans_whatever_the_accumulation_and_no_drawn_block_is_loaded(drawn, num_buffers, monkeypatch):
    streamed = Streamed(deep_llama(12), num_buffers=num_buffers)
    streamed.draw(drawn)
    loaded = []
    load = streamed.residency.device_buffers.load
    monkeypatch.setattr(
        streamed.residency.device_buffers, "load", lambda s, b, blob: (loaded.append(b), load(s, b, blob))
    )
    counts = []
    for step, parts in enumerate((1, 1, 1, 3, 5)):
        loaded.clear()
        streamed.take_step(batches(parts, seed=step))
        counts.append(len(loaded))
        assert not set(loaded) & set(drawn)
    planned = loads_of_step(12, min(drawn), set(range(12)) - set(drawn), num_buffers)
    assert counts[2:] == [sum(planned)] * 3


def test_half_a_turn_is_saved_where_the_reference_says():
    """Uniform draws of 5 among 32: 27 loads up, 22.5 down less the 2 that are still there (reference, section 4)."""
    stream = torch.Generator().manual_seed(0)
    totals = []
    for _ in range(300):
        drawn = set(torch.randperm(32, generator=stream)[:5].tolist())
        totals.append(sum(loads_of_step(32, min(drawn), set(range(32)) - drawn, 2)))
    assert sum(totals) / len(totals) == pytest.approx(47.5, abs=0.7)
    # Every block frozen and backward to the bottom (LoRA): 62 with one turn; the turn at the bottom saves two more.
    assert sum(loads_of_step(32, 0, range(32), 2)) == 60


def test_backward_visits_stop_at_the_lowest_block():
    assert step_visits(4, 2) == [0, 1, 2, 3, 3, 2]
    assert step_visits(3, 3) == [0, 1, 2]


def test_a_timed_queue_records_every_visit_copy_and_boundary_of_a_step():
    streamed = Streamed(deep_llama(6), offload=True, landing="real")
    queue = streamed.copy_queue
    streamed.draw((2,))
    streamed.take_step(batches(2))
    queue.timeline()
    began = time.perf_counter()
    streamed.take_step(batches(2))
    seconds = time.perf_counter() - began
    spans = queue.timeline()
    assert queue.timeline() == [] and min(span.start for span in spans) == 0
    assert all(0 <= span.start <= span.end <= seconds for span in spans)
    visits = sorted((span for span in spans if span.kind == "visit"), key=lambda span: span.start)
    assert [span.block for span in visits] == step_visits(6, 2)
    kinds = Counter(span.kind for span in spans)
    assert kinds["copy"] == sum(loads_of_step(6, 2, {0, 1, 3, 4, 5}, 2)) and kinds["loss"] == 1
    # Of two micro-batches four boundaries each leave; the last two and those never fetched stay.
    assert kinds["unload"] == 8 and kinds["fetch"] == 6
    steps = sorted((span for span in spans if span.kind in ("visit", "copy")), key=lambda span: span.start)
    assert all(a.end <= b.start for a, b in itertools.pairwise(steps))  # on a CPU nothing overlaps
    streamed.take_step(batches(2))
    assert 0 < queue.seconds()["copy"] < 60 and queue.seconds() == {"copy": 0, "stall": 0}


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("form", ["bf16", "int8", "nf4"])
def test_nothing_that_autograd_saved_shares_a_buffer_when_its_lease_ends(form, monkeypatch):
    streamed = Streamed(deep_llama(5), form=form)
    streamed.draw((1,))
    device_buffers = streamed.residency.device_buffers
    addresses = [b.untyped_storage().data_ptr() for b in device_buffers.buffers]
    saved, seen = [], []

    def pack(tensor):
        box = Box(tensor)
        if tensor.untyped_storage().data_ptr() in addresses:
            saved.append(weakref.ref(box))
            seen.append(tuple(tensor.shape))
        return box

    release = device_buffers.release

    def checked(index):
        assert not [ref for ref in saved if ref() is not None]
        release(index)

    monkeypatch.setattr(device_buffers, "release", checked)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        streamed.take_step(batches(2))
    assert seen if form == "bf16" else True  # norms and plain linear maps do save views of a buffer, inside the lease
    views = [t for v in streamed.residency._buffer_views.values() for fields in v.values() for t in fields.values()]
    held = {id(t) for t in (*device_buffers.buffers, *views, *(view._base for view in views))}
    for queue in streamed.copy_queue.queues.values():  # a copy under way knows where it goes
        queue.clear()
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.numel() and not t.is_meta]
    strangers = [t for t in tensors if t.untyped_storage().data_ptr() in addresses and id(t) not in held]
    assert not strangers


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_no_lease_is_left_after_a_step_an_error_or_an_interrupt(error, at):
    streamed = Streamed(deep_llama(5))
    streamed.draw((1,))
    leases = streamed.residency.device_buffers.leases
    streamed.take_step(batches())
    assert leases == [0, 0]
    module = streamed.parts.modules[3].mlp

    def fail(*_):
        if torch.is_grad_enabled() == (at == "backward"):
            raise error

    handle = module.register_forward_hook(fail)
    with pytest.raises(error):
        streamed.take_step(batches())
    handle.remove()
    assert leases == [0, 0] and streamed.boundaries.device_bytes() == 0
    assert all(torch.isnan(p).all() for p in streamed.parts.modules[3].parameters())


def test_a_buffer_under_a_forgotten_lease_is_not_refilled():
    streamed = Streamed(deep_llama(5))
    streamed.draw((1,))
    forgotten = streamed.residency.visit(2)
    forgotten.__enter__()
    with pytest.raises(RuntimeError, match="under a lease"):
        streamed.take_step(batches())


def test_buffer_bytes_never_change():
    streamed = Streamed(deep_llama(6))
    size = streamed.residency.device_buffers.num_bytes
    addresses = [b.data_ptr() for b in streamed.residency.device_buffers.buffers]
    for draw in ((0, 1), (5,), (2, 3, 4)):
        streamed.draw(draw)
        streamed.take_step(batches(2))
        assert streamed.residency.device_buffers.num_bytes == size
        assert [b.data_ptr() for b in streamed.residency.device_buffers.buffers] == addresses


def test_row_chunks_give_the_gradient_of_the_whole_batch():
    from owlore.data.batches import MicroBatch

    whole = batches(1, rows=6)[0]
    chunks = [
        MicroBatch(input_ids=i, labels=lab, num_trained=whole.num_trained // 3)
        for i, lab in zip(whole.input_ids.split(2), whole.labels.split(2), strict=True)
    ]
    sides, loads = [], []
    for parts in ([whole], chunks):
        side = Streamed(deep_llama(5))
        side.draw((1, 3))
        side.take_step(parts)
        sides.append({name: sum(given) for name, given in side.by_name().items()})
        loads.append(side.copy_queue.loads)
    assert loads[0] == loads[1]
    for name, gradient in sides[0].items():
        assert torch.allclose(gradient, sides[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_quantised_format_is_a_resident_model_quantised_by_hand(family, form, dtype):
    resident, streamed = pair(lambda: maker(family).to(dtype), form=form)
    quantised_by_hand(resident.model, form, keep=(1,))
    for side in (resident, streamed):
        side.draw((1,))
    for step in range(3):
        given = batches(2, seed=step)
        losses = [side.take_step(given) for side in (resident, streamed)]
        assert torch.equal(*losses) and same_bits(resident, streamed)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_lossy_matrix_is_made_dense_once_a_visit_for_several_micro_batches_and_does_not_outlive_it(
    parts, monkeypatch
):
    streamed = Streamed(deep_llama(4), form="nf4")
    streamed.draw((1,))
    made, dense = [], type(FORMATS["nf4"]).dense
    monkeypatch.setattr(type(FORMATS["nf4"]), "dense", lambda self, *given: made.append(1) or dense(self, *given))
    streamed.take_step(batches(parts))
    # Seven maps of each frozen block: three blocks upwards, two downwards (of one micro-batch again in backward).
    assert len(made) == 7 * (3 + 2 * (2 if parts == 1 else 1))
    packed = [p for binding in streamed.residency.bindings for p in binding._packed.values()]
    assert len(packed) == 28 and all(p.fields is None and p._dense is None for p in packed)


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_blocks_that_stay_on_the_device_give_the_same_bits(form):
    """A share of the top blocks, and all of them."""
    for resident_blocks in ((4, 5), range(6)):
        some, none = (Streamed(deep_llama(6), form=form, resident=blocks) for blocks in (resident_blocks, ()))
        for draw in ((1,), (2, 5), (0, 4), (3,)):
            for side in (some, none):
                side.draw(draw)
            for step in range(2):
                assert torch.equal(*(side.take_step(batches(2, seed=step)) for side in (some, none)))
                assert same_bits(some, none)
        assert some.copy_queue.loads < none.copy_queue.loads


@pytest.mark.parametrize("landing", LANDINGS)
def test_boundaries_that_travel_to_the_host_and_back_give_the_same_bits(landing):
    resident, streamed = pair(lambda: deep_llama(6), offload=True, landing=landing)
    assert steps_agree(resident, streamed, [(0,), (2, 4)], parts=3)
    assert streamed.copy_queue.unloaded_bytes > 0 and streamed.boundaries.host_bytes() > 0


def test_few_boundaries_are_on_the_device_when_they_are_offloaded():
    streamed = Streamed(deep_llama(12), offload=True, landing="late")
    streamed.draw((0,))
    most = []
    save = streamed.boundaries.save

    def counted(key, hidden):
        save(key, hidden)
        most.append(streamed.boundaries.device_bytes())

    streamed.boundaries.save = counted
    given = batches(1)
    streamed.take_step(given)
    one = given[0].input_ids.numel() * 16 * 4
    assert max(most) <= 3 * one and streamed.boundaries.host_bytes() == 12 * one


@pytest.mark.parametrize("offload", [False, True])
def test_dropout_draws_the_same_numbers(offload):
    def make():
        import transformers as t

        config = t.GPT2Config(n_embd=16, n_inner=24, n_layer=4, n_head=2, n_positions=64, vocab_size=64,
                              resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, initializer_range=0.1)  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return t.GPT2LMHeadModel(config).train()

    for groups in ((), ("embeddings",)):
        resident, streamed = pair(make, offload=offload, groups=groups)
        assert steps_agree(resident, streamed, [(1,), (0, 2)], parts=3)
    world = torch.get_rng_state()
    streamed.take_step(batches(2))
    assert torch.equal(torch.get_rng_state(), world)


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_autocast_holds_in_the_recomputation_too(form):
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    resident, streamed = pair(lambda: deep_llama(4), form=form)
    if form == "nf4":
        quantised_by_hand(resident.model, form, keep=(1,))
    for side in (resident, streamed):
        side.draw((1,))
    for step in range(3):
        losses = [side.take_step(batches(2, seed=step), context=autocast) for side in (resident, streamed)]
        assert torch.equal(*losses) and same_bits(resident, streamed)


def test_blocks_of_different_kinds_sizes_and_arguments_share_the_buffers():
    def make():
        model = tiny_models()["gemma2"]().train()
        wide = tiny_models()["gemma2"](1).model.layers[0].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(wide, name)
            shape = (old.in_features, 2 * old.out_features) if name != "down_proj" else (
                2 * old.in_features, old.out_features)  # fmt: skip
            new = nn.Linear(*shape, bias=False)
            nn.init.normal_(new.weight, std=0.1, generator=torch.Generator().manual_seed(3))
            setattr(wide, name, new)
        model.model.layers[1].mlp = wide
        return model

    kinds = {layer.self_attn.sliding_window for layer in make().model.layers}
    assert len(kinds) == 2
    resident, streamed = pair(make, num_buffers=2)
    assert steps_agree(resident, streamed, [(0,), (1,), (2,)], parts=2)


def test_a_model_whose_blocks_are_no_chain_is_refused():
    from htsr.errors import BadInput

    streamed = Streamed(deep_llama(3))
    model = streamed.model
    ids = batches()[0].input_ids
    streamed.chain.check(lambda: model(ids).logits)
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.sum()))
    model.model.layers[2].register_forward_hook(lambda m, i, o: o + seen[-1])
    with pytest.raises(BadInput, match="not a plain chain"):
        streamed.chain.check(lambda: model(ids).logits)
