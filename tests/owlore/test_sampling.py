"""Draws: exact inclusion, fixed size, purity; the reference's draw for comparison."""

import numpy as np
import paper
import pytest

from owlore.kernels.seeds import seed_for
from owlore.sampling import DRAWS, draw, draw_sequential, draw_shuffled, inclusion

PERIODS = 20_000


def table(blocks, seed, power=1.0):
    """Scores falling with depth, with noise, as LOD tables look."""
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, blocks)
    return noise * np.arange(1, blocks + 1.0) ** -power


def frequencies(pi, draws, seed=0):
    counts = np.zeros(len(pi))
    for period in range(PERIODS):
        counts[list(draws(pi, seed, period))] += 1
    return counts / PERIODS


@pytest.mark.parametrize(
    ("blocks", "gamma", "power"),
    [(32, 5, 1.0), (32, 8, 1.5), (30, 10, 2.0), (8, 5, 1.0), (5, 1, 1.0), (12, 11, 3.0)],
)
def test_frequencies_are_within_four_standard_errors_of_inclusion(blocks, gamma, power):
    scores = table(blocks, seed=blocks, power=power)
    pi = inclusion(scores, gamma)
    if power > 1:
        assert (gamma * scores / scores.sum()).max() > 1  # the case that the paper leaves open
    error = np.abs(frequencies(pi, draw) - pi)
    assert (error <= 4 * np.sqrt(pi * (1 - pi) / PERIODS) + 1e-12).all()


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_a_draw_is_a_sorted_set_of_gamma_blocks_and_a_pure_function(kind):
    pi = inclusion(table(17, seed=1), 6)
    for period in range(200):
        blocks = DRAWS[kind](pi, 3, period)
        assert len(blocks) == 6 == len(set(blocks)) and list(blocks) == sorted(blocks)
        assert blocks == DRAWS[kind](pi, 3, period)


def test_seed_and_period_change_the_draw():
    pi = inclusion(table(32, seed=0), 5)
    assert len({draw(pi, 0, period) for period in range(50)}) > 40
    assert len({draw(pi, seed, 0) for seed in range(50)}) > 40


def test_certain_blocks_are_in_every_draw_and_impossible_ones_in_none():
    pi = inclusion([5.0, 1.0, 1.0, 0.0, 1.0], 3)
    assert pi[0] == 1 and pi[3] == 0
    drawn = [draw(pi, 0, period) for period in range(500)]
    assert all(0 in blocks and 3 not in blocks for blocks in drawn)


def test_all_blocks_are_drawn_when_gamma_is_their_number():
    assert draw(inclusion(np.ones(7), 7), 0, 0) == tuple(range(7))


def test_nearly_every_pair_can_be_drawn_together():
    pi = inclusion(np.ones(6), 2)
    pairs = {draw(pi, 0, period) for period in range(600)}
    assert len(pairs) == 15


def test_the_sequential_draw_is_the_references_and_not_proportional():
    pi = inclusion(table(6, seed=2, power=1.5), 2)
    truth = paper.successive_inclusion(pi / pi.sum(), 2)
    found = frequencies(pi, draw_sequential)
    assert (np.abs(found - truth) <= 4 * np.sqrt(truth * (1 - truth) / PERIODS)).all()
    assert np.abs(truth - pi).max() > 0.02


@pytest.mark.parametrize(("blocks", "gamma"), [(12, 3), (7, 3), (5, 4)])
def test_shuffled_draws_visit_every_block_equally_often(blocks, gamma):
    pi = inclusion(np.ones(blocks), gamma)
    counts = np.zeros(blocks)
    for period in range(blocks):
        counts[list(draw_shuffled(pi, 0, period))] += 1
    assert (counts == gamma).all()


def test_shuffled_draws_take_the_orders_of_cycles_0_1_2_one_after_another():
    """A resumed run and another version have to draw the same blocks, so the seeds of the cycles are fixed."""
    pi = inclusion(np.ones(6), 2)
    streams = [np.random.Generator(np.random.Philox(key=seed_for(7, "cycle", cycle))) for cycle in range(3)]
    order = [int(block) for stream in streams for block in stream.permutation(6)]
    expected = [tuple(sorted(order[2 * period : 2 * period + 2])) for period in range(9)]
    assert [draw_shuffled(pi, 7, period) for period in range(9)] == expected


def test_cyclic_draws_walk_through_the_blocks():
    pi = inclusion(np.ones(5), 2)
    assert [DRAWS["cyclic"](pi, 0, period) for period in range(3)] == [(0, 1), (2, 3), (0, 4)]


@pytest.mark.parametrize("bad", [[0.5, 0.2], [1.5, 0.5], [float("nan"), 1.0], [-0.5, 1.5]])
def test_what_is_no_inclusion_is_refused(bad):
    with pytest.raises(ValueError, match=r"inclusion|whole number"):
        draw(np.array(bad), 0, 0)


def never_drawn(pi, kind, seed, periods):
    drawn = {block for period in range(periods) for block in DRAWS[kind](pi, seed, period)}
    return len(pi) - len(drawn)


def test_exact_inclusion_alone_leaves_blocks_undrawn():
    """LLaMA-2-7B's table, gamma 5, 30 periods: 2.5 of 32 blocks on average, as independent periods make it."""
    pi = inclusion(paper.LLAMA2_7B_LOD_TAU13, 5)
    expected = ((1 - pi) ** 30).sum()
    assert expected == pytest.approx(2.48, abs=0.01)
    found = [never_drawn(pi, "exact", seed, 30) for seed in range(200)]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 200**0.5)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_a_floor_bounds_the_chance_of_starvation(delta):
    """With pi >= 1 - delta^(1/T) a block stays undrawn in T periods with a chance of at most delta."""
    floor = 1 - delta ** (1 / 30)
    pi = inclusion(paper.LLAMA2_7B_LOD_TAU13, 5, floor)
    assert pi.min() == pytest.approx(floor) and pi.sum() == pytest.approx(5)
    undrawn = np.zeros(32)
    for seed in range(300):
        drawn = {block for period in range(30) for block in draw(pi, seed, period)}
        undrawn[sorted(set(range(32)) - drawn)] += 1
    assert (undrawn / 300 <= delta + 4 * np.sqrt(delta * (1 - delta) / 300)).all()
    assert undrawn.sum() / 300 < ((1 - inclusion(paper.LLAMA2_7B_LOD_TAU13, 5)) ** 30).sum()


@pytest.mark.parametrize("kind", ["shuffled", "cyclic"])
@pytest.mark.parametrize(("blocks", "gamma"), [(32, 5), (30, 4), (7, 2)])
def test_a_cycle_starves_no_block(kind, blocks, gamma):
    pi = inclusion(table(blocks, seed=0, power=2.0), gamma)
    cycle = -(-blocks // gamma)
    assert all(never_drawn(pi, kind, seed, cycle) == 0 for seed in range(20))
