"""Block scores: means over the entries a block has, and what separates the criteria."""

import pytest
import torch
from makers import generator

from owlore.kernels.block_scores import CRITERIA, block_means


@pytest.mark.parametrize("shape", [(16, 24), (19, 21), (3, 5), (8, 13), (13, 8)])
def test_a_mean_is_over_the_entries_of_the_block(shape):
    matrix = torch.randn(shape, generator=generator(0))
    means = block_means(matrix, 8)
    for i in range(means.shape[0]):
        for j in range(means.shape[1]):
            block = matrix[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].double()
            assert float(means[i, j]) == pytest.approx(float(block.mean()), abs=1e-12)


def test_a_checkerboard_has_no_signed_mean_but_the_largest_absolute_one():
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    flat = torch.full((16, 16), 0.5)
    both = torch.cat([board, flat], dim=1)
    scores = {name: c.finish(block_means(c.prepare(both.clone()), 16)).tolist() for name, c in CRITERIA.items()}
    assert scores == {"mean_of_abs": [[1.0, 0.5]], "abs_of_mean": [[0.0, 0.5]], "mean_square": [[1.0, 0.25]]}
