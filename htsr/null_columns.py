"""The columns that `--nulls` adds to scan.csv, after the others, and what each means; no imports."""

from __future__ import annotations

NULL_COLUMNS = {
    "alpha_low": "lower end of the 95 % bootstrap interval of alpha, xmin chosen anew in every replica",
    "alpha_high": "upper end of it",
    "share_below_2": "share of the replicas with alpha < 2, in [0, 1]",
    "share_2_to_4": "share with 2 <= alpha < 4",
    "share_4_to_6": "share with 4 <= alpha < 6",
    "share_above_6": "share with alpha >= 6",
    "alpha_least": "smallest alpha over all xmin whose Kolmogorov-Smirnov distance is within 5 % of the best",
    "alpha_most": "largest alpha over them",
    "alpha_avg": "mean of the bias-corrected alphas of all xmin, weighed by sqrt(n) exp(-2 n D^2)",
    "p_gof": "goodness of fit: below 0.1 a power law would rarely lie this far from its fit",
    "z_lognormal": "Vuong's likelihood ratio of power law and lognormal; positive speaks for the power law",
    "p_lognormal": "its two-sided p: above 0.1 the data do not decide",
    "z_exponential": "the same against an exponential tail",
    "p_exponential": "its two-sided p",
    "effective_rank": "exp of the entropy of the singular values' shares: how many directions count",
    "mp_sigma": "deviation of one entry of the noise whose Marchenko-Pastur law fits the bulk, in units of the weights",
    "mp_edge": "upper edge of that noise, in units of lambda",
    "num_spikes": "eigenvalues beyond the edge by more than 95 % of noise matrices ever are",
    "p_edge": "chance that noise with light tails and that deviation has a lambda_max as large (Tracy-Widom)",
    "kurtosis": "excess kurtosis of the entries: 0 for a normal law",
    "p_null": "chance that the same entries in random order have a lambda_max as large",
    "p_null_by": "how p_null was found: permutation (99 of them); tracy-widom, where the entries' tails are light; "
    "bound, an upper bound, where lambda_max lies far beyond what any order of the entries reaches",
    "alpha_farms": "PL_Alpha_Hill of the pooled eigenvalues of submatrices of one fixed shape (FARMS)",
}
TEXT_COLUMNS = ("p_null_by",)
INTEGER_COLUMNS = ("num_spikes",)
NOISE_LEVEL = 0.05  # from this p_null on a matrix cannot be told from noise
