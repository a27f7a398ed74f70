"""Literal transcriptions of the papers' formulas: slow, plain, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

# OwLore's metric_cache/llama2_7b_ratio_13.txt (LLaMA-2-7B, tau = 13, percent): the only table its authors shipped.
LLAMA2_7B_LOD_TAU13 = (
    0.2678090427, 0.2952778278, 0.1274385601, 0.1144503065, 0.0987532225, 0.0883675610, 0.0878427930, 0.0837711473,
    0.0801417494, 0.0721763453, 0.0706563959, 0.0696483671, 0.0629597995, 0.0590793827, 0.0552216960, 0.0537150882,
    0.0468273855, 0.0392315919, 0.0335851482, 0.0339755123, 0.0315913265, 0.0278769379, 0.0278443252, 0.0229400674,
    0.0254255502, 0.0209235157, 0.0242104802, 0.0181805902, 0.0183762664, 0.0208518666, 0.0240681703, 0.0824612039,
)  # fmt: skip


def water_filling(scores: Sequence[float], gamma: float, floor: float = 0.0) -> list[float]:
    """pi = min(1, max(floor, c * score)) with sum gamma, the level c found by bisection."""
    level = [0.0, 1.0 / min(s for s in scores if s > 0)]
    for _ in range(200):
        c = sum(level) / 2
        pi = [min(1.0, max(floor, c * s)) for s in scores]
        level[sum(pi) >= gamma] = c
    return pi


import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def galore_basis(gradient: Tensor, rank: int) -> Tensor:
    """GaLore (arXiv 2403.03507), section 4: the top r singular vectors of the smaller side, by a full SVD."""
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    rows, cols = gradient.shape
    return (vh[:rank].T if rows >= cols else u[:, :rank]).to(gradient.dtype)


def adamw(weight: Tensor, gradients: list[Tensor], lr: float, b1: float, b2: float, eps: float, decay: float) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2, in fp64, one line of it a line here."""
    theta = weight.double()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        theta = theta - lr * (m_hat / (v_hat.sqrt() + eps) + decay * theta)
    return theta


def galore_adamw(
    weight: Tensor, gradients: list[Tensor], basis: Tensor, lr: float, scale: float, b1: float, b2: float, eps: float
) -> Tensor:
    """GaLore, algorithm 2, with a fixed basis: Adam on R, then W <- W - lr * scale * back(N).

    The side is the one that the basis fits; of a square matrix the right one, as the paper has it.
    """
    right = weight.shape[1] == basis.shape[0]
    w, p = weight.double(), basis.double()
    m = v = torch.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        r = gradient.double() @ p if right else p.T @ gradient.double()
        m = b1 * m + (1 - b1) * r
        v = b2 * v + (1 - b2) * r * r
        n = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = w - lr * scale * (n @ p.T if right else p @ n)
    return w


def fira(
    weight: Tensor, gradients: list[Tensor], basis: Tensor, lr: float, scale: float, limit: float,
    b1: float, b2: float, eps: float,
) -> Tensor:  # fmt: skip
    """Fira (arXiv 2410.01623), algorithm 1, with a fixed left basis P (m x r), column by column.

    R = P^T G, psi(R) = Adam's direction; S_:i = |psi(R)_:i| / |R_:i| (G - P R)_:i; if |S_t| / |S_t-1| > limit then
    S_t <- S_t / |S_t| * limit |S_t-1|; W <- W - lr scale (P psi(R) + S).
    """
    w, p = weight.double(), basis.double()
    m = v = torch.zeros(())
    previous = None
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        r = p.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        psi = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        outside = g - p @ r
        s = torch.stack([psi[:, i].norm() / r[:, i].norm() * outside[:, i] for i in range(g.shape[1])], dim=1)
        if previous is not None and s.norm() / previous > limit:
            s = s / s.norm() * limit * previous
        previous = s.norm()
        w = w - lr * scale * (p @ psi + s)
    return w


def apollo(
    weight: Tensor, gradients: list[Tensor], projection: Tensor, lr: float, scale: float, limit: float,
    b1: float, b2: float, eps: float, *, mini: bool,
) -> Tensor:  # fmt: skip
    """APOLLO (arXiv 2412.05270), algorithm 1, with a fixed random projection P (r x m); mini: one ratio for all.

    R = P G; R~ = Adam's direction of R; s_j = |R~_:j| / |R_:j| (or |R~| / |R|); W <- W - lr scale G diag(s), its norm
    growing by at most `limit` a step.
    """
    w, p = weight.double(), projection.double()
    m = v = torch.zeros(())
    previous = None
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        r = p @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        adapted = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        ratios = [adapted.norm() / r.norm() if mini else adapted[:, j].norm() / r[:, j].norm()
                  for j in range(g.shape[1])]  # fmt: skip
        change = g @ torch.diag(torch.stack(ratios))
        if previous is not None and change.norm() / previous > limit:
            change = change / change.norm() * limit * previous
        previous = change.norm()
        w = w - lr * scale * change
    return w


def successive_inclusion(p: np.ndarray, gamma: int) -> np.ndarray:
    """Inclusion probabilities of drawing gamma times without replacement, by summing over all ordered draws."""
    from itertools import permutations

    pi = np.zeros(len(p))
    for order in permutations(range(len(p)), gamma):
        chance, left = 1.0, 1.0
        for block in order:
            chance, left = chance * p[block] / left, left - p[block]
        for block in order:
            pi[block] += chance
    return pi


def exhaustive_power_law(eigenvalues):  # type: ignore[no-untyped-def]
    """Clauset, Shalizi, Newman (2009) with weightwatcher 0.7.7's conventions: every candidate, one after the other.

    Returns (alpha, xmin, D, sigma, number of points in the fit); raises ValueError or IndexError where there is no fit.
    """
    import numpy as np

    x = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    N = len(x)
    log_x = np.log(x)
    alphas = np.zeros(N - 1)
    D = np.ones(N - 1)
    small_sample = N < 20
    any_tail = False
    for i in range(N - 1):
        n = float(N - i)
        log_sum = np.sum(log_x[i:]) - n * log_x[i]
        if small_sample:
            if n < 8 or log_sum <= 1e-12:
                continue
            any_tail = True
            alphas[i] = 1.0 + (n - 1.0) / log_sum
        else:
            with np.errstate(divide="ignore"):
                alphas[i] = 1 + n / log_sum
        if alphas[i] > 1:
            fitted = 1 - (x[i:] / x[i]) ** (-alphas[i] + 1)
            empirical = np.arange(n) / n
            D[i] = np.max(np.abs(fitted - empirical))
    if small_sample and not any_tail:  # no tail is long enough: the whole sample is one
        log_sum = np.sum(log_x) - N * log_x[0]
        if log_sum > 1e-12:
            alphas[0] = 1.0 + (N - 1.0) / log_sum
            D[0] = np.max(np.abs(1 - (x / x[0]) ** (-alphas[0] + 1) - np.arange(N) / N))
    best = np.argmin(D)
    return alphas[best], x[best], D[best], (alphas[best] - 1) / np.sqrt(N - best), N - best


def owl_lod(weights: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], tau: float) -> float:
    """OWL's check_outlier_mean for one block: pooled mean of |W| * ||X||_2, strict >, percent.

    weights[m] is (out, in); inputs[m] holds the samples (tokens, in) that the m-th linear map of the block read.
    """
    scores = []
    for weight, samples in zip(weights, inputs, strict=True):
        scaler_row = torch.zeros(weight.shape[1], dtype=torch.float64)
        for x in samples:
            scaler_row += torch.norm(x.double(), p=2, dim=0) ** 2 / len(samples)
        metric = torch.abs(weight.double()) * torch.sqrt(scaler_row.reshape((1, -1)))
        scores.append(torch.flatten(metric))
    pooled = torch.cat(scores)
    return float((pooled > tau * torch.mean(pooled)).sum() / pooled.numel() * 100)


def weight_lod(matrices, tau):  # type: ignore[no-untyped-def]
    """OWL's outlier ratio with |W| alone: percent of entries strictly above tau times the mean over all matrices."""
    import torch

    everything = torch.cat([W.double().abs().flatten() for W in matrices])
    limit = tau * everything.mean()
    pooled = 100.0 * (everything > limit).double().mean().item()
    return pooled, [100.0 * (W.double().abs() > limit).double().mean().item() for W in matrices]


def mpo_matrix(cores: Sequence[Tensor], rows: int, cols: int) -> Tensor:
    """DoTA (arXiv 2412.20891): W[(o_1..o_N), (i_1..i_N)] = C_1[:, o_1, i_1, :] ... C_N[:, o_N, i_N, :]."""
    from itertools import product

    out, into = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    whole = torch.zeros(int(np.prod(out)), int(np.prod(into)), dtype=cores[0].dtype)
    for o in product(*map(range, out)):
        for i in product(*map(range, into)):
            chain = torch.eye(1, dtype=cores[0].dtype)
            for core, ok, ik in zip(cores, o, i, strict=True):
                chain = chain @ core[:, ok, ik, :]
            row, col = np.ravel_multi_index(o, out), np.ravel_multi_index(i, into)
            whole[row, col] = chain[0, 0]
    return whole[:rows, :cols]


def mpo_apply(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """y = W x core by core, never forming W; the sides are those of the cores (no padding)."""
    into = [core.shape[2] for core in cores]
    state = x.reshape(-1, 1, *into)  # tokens, bond, what is left of the input, then the output built so far
    state = state.unsqueeze(-1)
    for core in cores:
        state = torch.einsum("tri...p,roin->tn...po", state, core)
        state = state.flatten(-2)
    return state.reshape(*x.shape[:-1], -1)


def tt_tails(weight: Tensor, out: Sequence[int], into: Sequence[int], bonds: Sequence[int]) -> list[float]:
    """Oseledets 2011, theorem 2.2: of each unfolding of the padded tensor, the squares of the discarded values."""
    count = len(out)
    padded = torch.zeros(int(np.prod(out)), int(np.prod(into)), dtype=weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    order = [axis for k in range(count) for axis in (k, count + k)]
    tensor = padded.reshape(*out, *into).permute(order)
    tails = []
    for k, bond in enumerate(bonds, start=1):
        left = int(np.prod(out[:k]) * np.prod(into[:k]))
        tails.append(float(torch.linalg.svdvals(tensor.reshape(left, -1))[bond:].square().sum()))
    return tails
