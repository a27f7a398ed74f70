"""Per-block compilation: the same gradients, four graphs, and the blocks as they were afterwards."""

import copy

import pytest
import torch
from makers import tiny_llama
from streaming import Resident, Streamed, batches, deep_llama, same_bits

from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.activations.compiled import compile_blocks, cpp_compiler
from owlore.blocks import find_parts, freeze
from owlore.patches import PatchStack
from owlore.training.loss import CausalLoss

# The lowest, a middle and the last block among the drawn ones; rows of several lengths.
DRAWS = (((2, 4), (2, 12)), ((1, 3), (2, 12)), ((0, 1), (3, 20)), ((4,), (2, 7)), ((0, 4), (4, 16)))
CPU = torch.device("cpu")


def gradients(model, parts, active, shape, *, backend=None, recomputed=False):
    freeze(model)
    for parameter in parts.parameters(active, ()).values():
        parameter.requires_grad_(True)
    loss = CausalLoss(model)
    patches = PatchStack()
    if backend is not None:
        compile_blocks(parts.modules, device=CPU, backend=backend, patches=patches)
    recompute = ActivationCheckpointing(parts.modules, enabled=recomputed, patches=patches)
    recompute.lowest = min(active)
    ids = torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(0))
    try:
        loss(ids, ids).backward()
    finally:
        patches.close()
    assert all("forward" not in vars(block) for block in parts.modules)
    return {name: parameter.grad for name, parameter in parts.parameters(active, ()).items()}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own parts
@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_share_four_graphs_over_all_draws_and_lengths(recomputed):
    model = tiny_llama(blocks=5)
    parts = find_parts(model)
    seen = []
    torch.compiler.reset()

    def counting(graph, inputs):
        seen.append(graph)
        return graph.forward

    for active, shape in DRAWS:
        plain = gradients(model, parts, active, shape, recomputed=recomputed)
        ours = gradients(model, parts, active, shape, backend=counting, recomputed=recomputed)
        assert all(torch.equal(plain[name], ours[name]) for name in plain), (active, shape)
        assert len(seen) <= 4, (active, shape)
    # Below the lowest drawn block, that block, a frozen one above it and a drawn one above it: all were there.
    assert len(seen) == 4


@pytest.mark.filterwarnings("ignore")
def test_streamed_blocks_share_six_graphs_and_give_the_resident_gradients():
    """Up without gradients (frozen, drawn; one row, as the loss is probed with), down (frozen, drawn, the lowest):
    whatever state the weights are in."""
    seen = []
    torch.compiler.reset()

    def counting(graph, inputs):
        seen.append(graph)
        return graph.forward

    model = deep_llama(6)
    resident = Resident(copy.deepcopy(model))
    patches = PatchStack()
    compile_blocks(find_parts(model).modules, device=CPU, backend=counting, always=True, patches=patches)
    streamed = Streamed(model)
    for draw in ((2, 4), (1, 3), (0, 1), (5,)):
        for side in (resident, streamed):
            side.draw(draw)
        for step in range(2):
            losses = [side.take_step(batches(2, seed=step)) for side in (resident, streamed)]
            assert torch.equal(*losses) and same_bits(resident, streamed)
        assert len(seen) == 6
    patches.close()


@pytest.mark.filterwarnings("ignore")
def test_streamed_blocks_with_dropout_are_not_compiled(monkeypatch, tmp_path):
    from functools import partial

    from makers import save_tiny

    import owlore
    from htsr.errors import UsageError

    compile_plainly = partial(compile_blocks, backend=lambda graph, inputs: graph.forward)
    monkeypatch.setattr("owlore.run.build.compile_blocks", compile_plainly)
    settings = {"table": "uniform", "steps": 2, "compile": True, "residency": "host", "rank": 4}
    rows = [{"prompt": "a: ", "completion": "b"}]
    model = save_tiny(tmp_path / "dropout", attention_dropout=0.1)
    with pytest.raises(UsageError, match="random numbers"):
        owlore.train(model, rows, out=tmp_path / "run", **settings)
    model = save_tiny(tmp_path / "model")
    runs = [owlore.train(model, rows, out=tmp_path / f"{compiled}", **{**settings, "compile": compiled})
            for compiled in (True, False)]  # fmt: skip
    assert runs[0].history["loss"].tolist() == runs[1].history["loss"].tolist()
    assert "forward" not in vars(runs[0].model.model.layers[0])


@pytest.mark.slow  # gcc needs minutes for the four graphs and their backwards
@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler (g++ or clang++) on this machine")
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_the_same_with_and_without_compiled_code():
    model = tiny_llama(blocks=5)
    parts = find_parts(model)
    torch.compiler.reset()
    for active, shape in DRAWS[:3]:
        plain = gradients(model, parts, active, shape)
        ours = gradients(model, parts, active, shape, backend="inductor")
        for name in plain:
            assert (plain[name] - ours[name]).norm() <= 1e-5 * plain[name].norm(), name


def test_without_a_compiler_the_flag_is_refused(monkeypatch, tmp_path):
    from makers import save_tiny

    import owlore
    from htsr.errors import UsageError

    monkeypatch.setattr("owlore.activations.compiled.cpp_compiler", lambda: None)
    model = save_tiny(tmp_path / "model")
    with pytest.raises(UsageError, match="g\\+\\+"):
        owlore.train(model, [{"prompt": "a: ", "completion": "b"}], table="uniform", steps=1, compile=True,
                     out=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()
