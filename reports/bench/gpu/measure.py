"""One row, in a process of its own: skip with a reason, or assert, run and count."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from ours import EVERY, Ours, gradients, strategy_config
from rows import PLACEMENTS, Row
from shapes import filled, skeleton

from owlore.optim import MasterPolicy
from owlore.plan.device_rates import STEP_SHARE, measured_rates
from owlore.plan.model_spec import ModelSpec, spec_of_model
from owlore.plan.plan import Plan, make_plan
from owlore.plan.traffic import Rates
from owlore.strategies import STRATEGIES
from owlore.training.streamed import available_memory

LONG = 50  # steps of a real period; here they are short, and a step that draws costs more than others
CONTEXT = 700_000_000  # bytes beside what is planned: the CUDA context and the allocator's rounding


@lru_cache(maxsize=4)
def described(shape: str) -> ModelSpec:
    """The shape from its configuration; what a block saves is counted on two of its blocks."""
    return spec_of_model(skeleton(shape, torch.device("meta")))


def prepare() -> None:
    """Import what a row may need, before it is known which one it is."""
    from peft import LoraModel  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import htsr  # noqa: F401

    described("llama-2-7b")  # most rows are of it


def planned(row: Row, rates: Rates | None = None) -> Plan:
    """What the row will hold and how long its copies take."""
    shape = described(row.shape)
    blocks = shape.parts.num_blocks
    return make_plan(
        shape, STRATEGIES["owlore"], strategy_config(row, blocks), policy=MasterPolicy.STOCHASTIC, batch=row.batch,
        accum=row.accum, tokens=row.tokens, recompute=True, placement=row.placement, rates=rates or Rates(),
    )  # fmt: skip


def measure(row: Row, device: torch.device) -> dict[str, Any]:
    """The row's result as JSON; `skipped` with a reason where it cannot be run here."""
    kinds = {"agree": agree, "ours": ours, "peer": peer, "scan": scan}
    try:
        return kinds[row.kind](row, device)
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of device memory: {str(error).splitlines()[0]}"}


ALIKE = (("device", "host", "host+half"), ("device+nf4", "host+nf4", "host+nf4+offload"))  # the same function each


def agree(row: Row, device: torch.device) -> dict[str, Any]:
    """Losses and every gradient of three steps are the same bits wherever blocks live; six blocks of the shape."""
    # Attention's backward on a GPU adds in any order otherwise. Only a process of its own is changed for good.
    torch.use_deterministic_algorithms(device.type == "cuda")
    compared = 0
    for names in ALIKE:
        rows = (replace(row, placement=PLACEMENTS[name]) for name in names)
        expected, *others = (gradients(Ours(each, device, blocks=6), 3) for each in rows)
        for found in others:
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one["loss"], other["loss"]), f"losses differ among {names}"
                assert one["gradients"] and one["gradients"].keys() == other["gradients"].keys()
                for name, values in one["gradients"].items():
                    pairs = zip(values, other["gradients"][name], strict=True)
                    assert values and all(torch.equal(a, b) for a, b in pairs), f"{name} differs among {names}"
                    compared += len(values)
    return {"gradients_compared": compared, "alike": [list(names) for names in ALIKE]}


def ours(row: Row, device: torch.device) -> dict[str, Any]:
    rates = measured_rates(device)
    plan = planned(row, rates)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if plan.bytes["total"] + CONTEXT > free:
            return {"skipped": f"needs {gib(plan.bytes['total'])} GiB, {gib(free)} free"} | _plan_of(plan)
    blocks = described(row.shape).parts.num_blocks
    steps = row.steps or EVERY * -(-blocks // row.gamma)
    kinds = plan.host or {}
    drawn = kinds.get("overlay", 0) // blocks * row.gamma * -(-steps // EVERY)  # what is trained is kept
    host = sum(kinds.get(kind, 0) for kind in ("store", "boundaries", "embedding")) + min(
        drawn, kinds.get("overlay", 0)
    )
    if host > available_memory():
        return {"skipped": f"needs {gib(host)} GiB of host memory, {gib(available_memory())} free"} | _plan_of(plan)
    trainer = Ours(row, device)
    trainer.advance()  # the first step allocates, and finds bases
    _reset(device, trainer.copy_queue)
    losses, started, first = [], time.perf_counter(), trainer.step
    marks = [_moment(device)]
    for _ in range(steps):
        losses.append(trainer.advance())
        marks.append(_moment(device))
    seconds = _wait(device, started)
    each = [_between(a, b) for a, b in itertools.pairwise(marks)]
    switching = statistics.mean(s for i, s in enumerate(each, first) if i % EVERY == 0)
    steady = statistics.mean(s for i, s in enumerate(each, first) if i % EVERY)
    tokens = row.batch * row.accum * row.tokens * steps
    operations = plan.traffic.compute_seconds * plan.traffic.tflops * 1e12 * steps
    product = None if rates is None else rates.flops / STEP_SHARE
    copies = trainer.copy_queue
    spent = {} if copies is None else copies.seconds()
    loaded = {} if copies is None else {"loads": copies.loads / steps, "bus_bytes": copies.loaded_bytes / steps}
    held = None if trainer.residency is None else trainer.residency.device_bytes()
    return {
        "steps": steps, "seconds": seconds / steps, "tokens_per_s": tokens / seconds, **_peaks(device),
        "steady_seconds": steady, "switching_seconds": switching,
        "long_tokens_per_s": tokens / steps / (steady + (switching - steady) / LONG),
        "last_loss": float(losses[-1]), "tflops": operations / seconds / 1e12,
        "mfu_of_product": None if product is None else operations / seconds / product,
        "product_tflops": None if product is None else product / 1e12, "bus": None if rates is None else rates.bus,
        "bus_seconds": spent.get("copy", 0.0) / steps, "stall_seconds": spent.get("stall", 0.0) / steps, **loaded,
        "block_bytes": held, "wanted_gib": row.wanted_gib, "timeline": [] if copies is None else one_step(trainer),
    } | _plan_of(plan)  # fmt: skip


def one_step(trainer: Ours) -> list[list[Any]]:
    """Spans of a step in which nothing is drawn: kind, block, start and end in seconds."""
    while trainer.step % EVERY == 0:
        trainer.advance()
    trainer.copy_queue.timeline()
    trainer.advance()
    return [[span.kind, span.block, span.start, span.end] for span in trainer.copy_queue.timeline()]


def _plan_of(plan: Plan) -> dict[str, Any]:
    return {"planned_bytes": plan.bytes, "planned_host_bytes": plan.host, "planned_step": plan.traffic.to_dict()}


def peer(row: Row, device: torch.device) -> dict[str, Any]:
    from peers import run_peer
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                _reset(device, None)
                self.started = time.perf_counter()

    steps, clock = row.steps or 8, Clock()
    run_peer(row, device, steps, clock)
    seconds = _wait(device, clock.started)
    tokens = row.batch * row.accum * row.tokens * (steps - 1)
    return {"steps": steps - 1, "seconds": seconds / (steps - 1), "tokens_per_s": tokens / seconds, **_peaks(device)}


def scan(row: Row, device: torch.device) -> dict[str, Any]:
    """Alpha of every matrix; with a tokenizer at hand LOD too."""
    from transformers import AutoTokenizer

    import htsr
    from htsr.model.locate import locate

    model = filled(row.shape, device, blocks=row.steps)
    tokenizer = AutoTokenizer.from_pretrained(locate("demo"))  # any text will do; its ids are below every vocabulary
    started = time.perf_counter()
    result = htsr.scan(model, device=str(device), tokenizer=tokenizer, samples=4, plots=False, quiet=True, fresh=True)
    seconds = _wait(device, started)
    return {"seconds": seconds, "matrices": len(result.frame), "blocks": len(result.blocks), **_peaks(device)}


def _reset(device: torch.device, copies: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    if copies is not None:
        copies.seconds()
        copies.loads = copies.loaded_bytes = 0


def _moment(device: torch.device) -> Any:
    """Now, in the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _wait(device: torch.device, started: float) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peaks(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"peak_bytes": None}  # a CPU's resident set says nothing about a device
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device), "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }  # fmt: skip


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
