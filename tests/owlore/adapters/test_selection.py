"""Which blocks are trained: the budget to the block, scores equal to the full gradient's, nothing left behind."""

import copy
import gc
from collections import Counter

import pytest
import torch
from makers import generator, tiny_llama, tiny_models
from torch import nn

from owlore.adapters import SmtConfig, select_blocks, selection
from owlore.adapters.nf4_linear import Nf4Linear
from owlore.adapters.selection import allot, best_cells, budget, diagonal_cells, make_map, score_blocks
from owlore.adapters.targets import count_2d, find_targets
from owlore.kernels.block_scores import CRITERIA, block_means

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
BATCHES = [
    {"input_ids": (ids := torch.randint(3, 64, (2, 12), generator=generator(k))), "labels": ids} for k in range(3)
]


def llama(**settings):
    return tiny_llama(blocks=3, width=40, hidden=52, **settings)


def config(**settings):
    return SmtConfig(
        **{"target_modules": TARGETS, "density": 0.05, "block_size": 8, "selection": "gradient"} | settings
    )


def count(block_map):
    return sum(len(cells) for cells in block_map["blocks"].values())


def meta_llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**settings))


def test_the_budget_of_llama_7b_is_the_papers():
    """arXiv 2405.15525: 102,816 blocks of 256, of which 0.84 % are 863; 56.6 M parameters, 9 blocks a matrix."""
    model = meta_llama()
    assert count_2d(model) == 102_816 * 256**2
    settings = SmtConfig(target_modules=["q_proj", "k_proj", "v_proj"])
    chosen = budget(model, settings)
    assert (chosen.blocks, chosen.block_size) == (863, 256) and chosen.blocks * 256**2 == 56_557_568
    shares = Counter(len(cells) for cells in make_map(model, settings)["blocks"].values())
    assert shares == {9: 95, 8: 1}
    best = budget(model, SmtConfig(target_modules=["q_proj", "k_proj", "v_proj"], density=0.0491))
    assert best.blocks == 5048


def test_the_budget_of_llama3_8b_is_the_papers():
    model = meta_llama(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
    assert count_2d(model) == 122_528 * 256**2
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    assert budget(model, SmtConfig(**settings)).blocks == 1029
    assert budget(model, SmtConfig(**settings, density=0.0071)).blocks == 869


def test_blocks_are_halved_until_every_target_matrix_can_have_one():
    model = llama()
    chosen = budget(model, SmtConfig(target_modules=TARGETS))
    share, targets = 0.0084 * count_2d(model), len(find_targets(model, config()))
    assert chosen.blocks == int(share / chosen.block_size**2) >= targets
    assert int(share / (2 * chosen.block_size) ** 2) < targets
    assert budget(model, config(density=1e-6)).blocks == 1


def test_tied_weights_count_once_and_quantised_ones_by_what_they_stand_for():
    tied, untied = llama(tied=True), llama()
    assert count_2d(untied) - count_2d(tied) == 64 * 40
    before = count_2d(untied)
    layer = untied.model.layers[0].self_attn
    layer.q_proj = Nf4Linear(layer.q_proj.weight.detach(), layer.q_proj)
    assert count_2d(untied) == before
    gpt2 = tiny_models()["gpt2"]()
    assert count_2d(gpt2) == sum(p.numel() for p in gpt2.parameters() if p.ndim == 2)


@pytest.mark.parametrize("allotment", ["global", "per_matrix"])
@pytest.mark.parametrize("choice", ["diagonal", "random", "magnitude", "gradient"])
def test_every_selection_meets_the_budget_exactly(choice, allotment):
    model, settings = llama(), config(selection=choice, allotment=allotment, density=0.03)
    chosen = budget(model, settings)
    block_map = select_blocks(model, BATCHES, settings) if choice == "gradient" else make_map(model, settings)
    assert count(block_map) == chosen.blocks and block_map["block_size"] == chosen.block_size
    assert all(len({tuple(c) for c in cells}) == len(cells) for cells in block_map["blocks"].values())
    if allotment == "per_matrix" or choice == "diagonal":
        sizes = [len(block_map["blocks"][target.name]) for target in find_targets(model, settings)]
        assert max(sizes) - min(sizes) <= 1


def test_random_blocks_are_a_function_of_the_seed():
    maps = [make_map(llama(), config(selection="random", seed=seed)) for seed in (0, 0, 1)]
    assert maps[0] == maps[1] != maps[2]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_streamed_scores_are_the_full_gradients(criterion, family):
    model = llama(dtype=torch.float64) if family == "llama" else tiny_models()[family]().double()
    names = {"llama": TARGETS, "gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "up_proj"]}[family]
    settings = config(target_modules=names, criterion=criterion)
    scores = score_blocks(model.eval(), BATCHES, settings, 8)
    rule = CRITERIA[criterion]
    truth = dict.fromkeys(scores, 0)
    for batch in BATCHES:
        model.zero_grad()
        model(**batch).loss.backward()
        for target in find_targets(model, settings):
            gradient = target.module.weight.grad
            matrix = gradient.T if gradient.shape != target.shape or family == "gpt2" else gradient
            truth[target.name] += block_means(rule.prepare(matrix.clone()), 8)
    for name, score in scores.items():
        assert torch.allclose(score, rule.finish(truth[name] / 3), rtol=1e-9, atol=0)


def test_planted_blocks_are_found():
    """y = (W + D) x with D on known blocks; the gradient of the squared error at W lies exactly there."""
    planted = {"0": [[1, 2], [3, 0]], "1": [[0, 0]]}
    student = nn.ModuleList([nn.Linear(32, 40, bias=False), nn.Linear(24, 16, bias=False)])
    x = [torch.randn(256, 32, generator=generator(1)), torch.randn(256, 24, generator=generator(2))]
    teacher = copy.deepcopy(student)
    for name, cells in planted.items():
        for i, j in cells:
            teacher[int(name)].weight.data[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] += 0.3

    def loss(model, batch):
        return sum((model[k](x[k]) - teacher[k](x[k])).square().mean() for k in range(2))

    entries = sum(p.numel() for p in student.parameters())
    settings = config(target_modules=["0", "1"], density=3 * 64 / entries)
    assert select_blocks(student, [None], settings, loss=loss) == {"block_size": 8, "blocks": planted}


def test_ties_go_to_the_earlier_matrix_row_and_column():
    scores = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.tensor([[0.0, 2.0], [0.0, 0.0]])}
    assert best_cells(scores, 4, "global") == {"b": [(0, 1)], "a": [(0, 0), (0, 1), (1, 0)]}


def test_an_even_allotment_spreads_the_remainder_and_respects_what_a_matrix_can_take():
    assert allot(10, [5, 5, 5, 5]) == [2, 3, 2, 3]
    assert allot(10, [1, 100, 1, 100]) == [1, 4, 1, 4]
    assert allot(10, [1, 2]) == [1, 2]


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 2), (5, 3), (1, 1), (1, 7)])
def test_diagonals_are_spread_and_go_on_beside_the_diagonal_when_it_is_full(grid):
    for wanted in range(1, grid[0] * grid[1] + 1):
        cells = diagonal_cells(grid, wanted)
        assert len(set(cells)) == wanted and all(0 <= i < grid[0] and 0 <= j < grid[1] for i, j in cells)
    if grid[0] == grid[1]:
        assert sorted(diagonal_cells(grid, grid[0])) == [(i, i) for i in range(grid[0])]


def test_selection_leaves_weights_gradients_flags_and_hooks_as_they_were():
    model = llama()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    marked = model.model.embed_tokens.weight
    marked.grad = torch.ones_like(marked)
    before = copy.deepcopy(model.state_dict())
    select_blocks(model, BATCHES, config())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [k % 2 == 0 for k in range(len(list(model.parameters())))]
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert not any(module._forward_hooks for module in model.modules())


def test_only_one_matrixs_gradient_is_alive_at_a_time(monkeypatch):
    """Every living tensor is walked each time a gradient is scored."""
    model = tiny_llama(blocks=3, width=40, hidden=53)  # 53 is no activation's size
    shapes = {target.shape for target in find_targets(model, config())}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = []

    def census(gradient, block):
        alive = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and tuple(t.shape) in shapes and t.untyped_storage().data_ptr() not in weights
        }
        seen.append(alive)
        assert alive == {gradient.untyped_storage().data_ptr()}
        return block_means(gradient, block)

    monkeypatch.setattr(selection, "block_means", census)
    select_blocks(model, BATCHES[:1], config())
    assert len(seen) == 12


def test_a_quantised_base_is_scored_as_its_dequantised_twin():
    quantised, dense = llama(), llama()
    for theirs, mine in zip(quantised.model.layers, dense.model.layers, strict=True):
        for name in ("q_proj", "v_proj"):
            linear = getattr(theirs.self_attn, name)
            setattr(theirs.self_attn, name, Nf4Linear(linear.weight.detach(), linear))
            getattr(mine.self_attn, name).weight.data.copy_(getattr(theirs.self_attn, name).dense())
    settings = config(target_modules=["q_proj", "v_proj"])
    pair = [score_blocks(model, BATCHES, settings, 8) for model in (quantised, dense)]
    for name, score in pair[0].items():
        assert torch.allclose(score, pair[1][name], rtol=1e-4)


def test_checkpointed_blocks_are_scored_once():
    from torch.utils.checkpoint import checkpoint

    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = torch.randn(8, 16, generator=generator(0))
    settings = config(target_modules=["0", "2"])

    def recomputed(model, batch):
        return checkpoint(model, x, use_reentrant=False).square().mean()

    pair = [score_blocks(plain, [None], settings, 8, loss=loss)
            for loss in (recomputed, lambda model, batch: model(x).square().mean())]  # fmt: skip
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_no_batches_and_bad_gradients_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        select_blocks(llama(), [], config())
    broken = llama()
    broken.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        select_blocks(broken, BATCHES, config())
