"""Two ways to take the same steps: a model that is all in memory in the usual loop, and one with streamed blocks."""

import copy
from contextlib import nullcontext

import torch
from fake_copy_queue import FakeCopyQueue
from makers import tiny_llama, tiny_models
from torch import nn

from owlore.blocks import find_parts, freeze
from owlore.data.batches import IGNORED, MicroBatch
from owlore.kernels import int8, nf4
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.residency.block_chain import BlockChain
from owlore.residency.boundaries import Boundaries
from owlore.residency.build import fill_from_modules
from owlore.residency.copy_queue import open_copy_queue
from owlore.residency.exact_weights import Overlay
from owlore.residency.formats import FORMATS
from owlore.residency.pinned import pageable
from owlore.residency.residency import Residency
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.step import train_step
from owlore.training.streamed import StreamedBackend
from owlore.training.streamed_step import StreamedStep

SHAPES = ("llama", "qwen2", "gpt2", "gemma")
LOW_LR = 1e-2


def batches(count=1, *, rows=2, seed=0, vocab=60):
    """Micro-batches of different lengths."""
    stream = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(4, vocab, (rows, 9 + 2 * index), generator=stream)
        labels = ids.clone()
        labels[:, :2] = IGNORED
        made.append(MicroBatch(input_ids=ids, labels=labels, num_trained=int((labels[:, 1:] != IGNORED).sum())))
    return made


def deep_llama(blocks, **settings):
    return tiny_llama(blocks=blocks, width=16, heads=2, kv_heads=1, hidden=24, **settings).train()


def maker(family):
    return tiny_models()[family]().train()


class Side:
    """A model, its optimizer, and every gradient that the optimizer was given, in order.

    in_products: linear maps give their gradients projected, as in a run; these are not seen here.
    """

    def __init__(self, model, *, rank=None, groups=(), in_products=False):
        self.model, self.groups, self.rank = model, groups, rank
        freeze(model)
        self.parts = find_parts(model)
        everything = self.parts.parameters(range(self.parts.num_blocks), self.parts.groups)
        self.optimizer = RotatingOptimizer(everything, seed=0, layers=self.parts.modules if in_products else ())
        self.gradients = []
        self.watches = True  # a copy of every gradient is kept
        self.step = 0
        self.active = ()

    def draw(self, blocks):
        self.active = tuple(sorted(blocks))
        rules = dict.fromkeys(self.parts.parameters(blocks, self.groups), UpdateSpec(rank=self.rank))
        self.optimizer.switch(rules, self.step, between=lambda: self.backend.set_active(rules))
        for name, state in self.optimizer.states.items() if self.watches else ():
            if not hasattr(state, "watched"):
                state.watched, accumulate = True, state.accumulate
                state.accumulate = self._watching(name, accumulate)

    def _watching(self, name, accumulate):
        def watched(gradient, *, last, step):
            self.gradients.append((name, last, gradient.clone()))
            accumulate(gradient, last=last, step=step)

        return watched

    def take_step(self, parts, *, context=nullcontext):
        """Loss of every micro-batch; gradients are in `gradients`, the update is done."""
        self.gradients.clear()
        with context():
            result = train_step(self.backend, self.optimizer, dict(enumerate(parts)), step=self.step, lr=LOW_LR,
                                clip=1.0, seed=7)  # fmt: skip
        self.step += 1
        return torch.tensor(result.losses)

    def by_name(self):
        found = {}
        for name, _, gradient in self.gradients:
            found.setdefault(name, []).append(gradient)
        return found


class Resident(Side):
    """Everything in memory, one micro-batch after another."""

    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.loss = CausalLoss(model)
        self.backend = ResidentBackend(self.parts, self.optimizer, self.loss, model.device)


class Streamed(Side):
    """Blocks in a store, block by block.

    Args:
        landing: how the fake device's copies land; "real" for the device of the model, timed.
        num_buffers, form, resident, pin: of `Residency`.
        offload: of `Boundaries`.
        seed: of the order in which copies land.
        read: reads a tensor of the checkpoint by the parameter's name; None where there is no checkpoint.
    """

    def __init__(self, model, *, landing="random", num_buffers=2, form="bf16", resident=(), offload=False, seed=0,
                 read=None, pin=pageable, **settings):  # fmt: skip
        super().__init__(model, **settings)
        real = landing == "real"
        self.copy_queue = open_copy_queue(model.device, timed=True) if real else FakeCopyQueue(landing, seed=seed)
        names = [[name for name, _ in block] for block in self.parts.blocks]
        self.residency = Residency(self.parts.modules, names, form=FORMATS[form], resident=resident, pin=pin,
                                   copy_queue=self.copy_queue, num_buffers=num_buffers)  # fmt: skip
        if not real:
            self.copy_queue.watch(self.residency.device_buffers)
        self.overlay = Overlay()
        self.num_kept = fill_from_modules(
            self.residency, stored_name=lambda name: name if read else None, read=read, overlay=self.overlay
        )
        self.chain = BlockChain(self.parts.modules, self.residency.visit)
        self.boundaries = Boundaries(self.copy_queue, offload=offload, pin=pin)
        self.loss = CausalLoss(model)
        step = StreamedStep(self.loss, self.optimizer, self.residency, self.chain, self.boundaries)
        self.backend = StreamedBackend(parts=self.parts, residency=self.residency, chain=self.chain, frozen=form,
                                       boundaries=self.boundaries, overlay=self.overlay, embedding=None,
                                       _step=step)  # fmt: skip


def pair(make, *, resident=None, **settings):
    """(Resident, Streamed) of the same weights."""
    common = {key: settings.pop(key) for key in ("rank", "groups") if key in settings}
    model = make()
    return Resident(copy.deepcopy(model), **common), Streamed(model, resident=resident or (), **common, **settings)


def same_bits(a, b):
    """Do both sides have gradients, of the same parameters in the same order for each, with the same bits?"""
    ours, theirs = a.by_name(), b.by_name()
    return bool(ours) and ours.keys() == theirs.keys() and all(
        len(x) == len(y) and all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        for x, y in ((ours[name], theirs[name]) for name in ours)
    )  # fmt: skip


def quantised_by_hand(model, form, keep):
    """Every linear map of the blocks that are not in `keep` replaced by what its codes stand for."""
    for index, block in enumerate(find_parts(model).modules):
        for module in block.modules() if index not in keep else ():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                W = module.weight.data
                dense = nf4.dequantise(nf4.quantise(W), W.dtype) if form == "nf4" else int8.dequantise(
                    *int8.quantise(W), W.dtype
                )  # fmt: skip
                module.weight.data.copy_(dense)
