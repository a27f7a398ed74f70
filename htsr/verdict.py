"""In words: which matrices of a scan cannot be told from noise, and whose exponents stand on a chosen xmin."""

from __future__ import annotations

import pandas as pd

from htsr.null_columns import NOISE_LEVEL

NAMED = 6  # matrices called by name; the table has the rest
WIDE = 1.0  # of alpha: a range over equally good xmin from which an exponent is no number to rank by
REJECTED = 0.1  # p_gof, Clauset et al.


def null_sentences(frame: pd.DataFrame) -> list[str]:
    """The findings of `--nulls`; none without its columns."""
    if "p_null" not in frame:
        return []
    return [*_noise(frame), *_power_law(frame), *_thresholds(frame)]


def _noise(frame: pd.DataFrame) -> list[str]:
    tested = frame[frame["p_null"].notna()].sort_values("p_null", ascending=False, kind="stable")
    if tested.empty:
        return ["No matrix could be compared with noise."]
    alike = tested[tested["p_null"] >= NOISE_LEVEL]
    if alike.empty:
        return [
            f"All {len(tested)} matrices differ from noise: the same entries in random order have a smaller largest "
            f"eigenvalue (p_null < {NOISE_LEVEL:g})."
        ]
    good = int(alike["alpha"].astype(float).between(2, 6).sum())
    flat = int((alike["p_null"] > 1 - NOISE_LEVEL).sum())
    verb = "is" if flat == 1 else "are"
    return [
        f"{len(alike)} of {len(tested)} matrices cannot be told from noise: their largest eigenvalue is one that the "
        f"same entries in random order have as well (p_null >= {NOISE_LEVEL:g}): {_names(alike)}."
        + (f" The alphas of {good} of them lie between 2 and 6 all the same." if good else "")
        + (f" {flat} {verb} even flatter than noise (p_null > {1 - NOISE_LEVEL:g})." if flat else "")
    ]


def _power_law(frame: pd.DataFrame) -> list[str]:
    fitted = frame[frame["p_gof"].notna()]
    if fitted.empty:
        return []
    rejected = int((fitted["p_gof"] < REJECTED).sum())
    undecided = int((fitted["p_lognormal"] >= REJECTED).sum())
    worse = int(((fitted["p_lognormal"] < REJECTED) & (fitted["z_lognormal"] < 0)).sum())
    return [
        f"A power law fits the tail badly (p_gof < {REJECTED:g}) in {rejected} of {len(fitted)} matrices; a lognormal "
        f"fits better in {worse} and cannot be told from it in {undecided}. Alpha is the slope of a tail, no proof of "
        "a power law."
    ]


def _thresholds(frame: pd.DataFrame) -> list[str]:
    width = (frame["alpha_most"] - frame["alpha_least"]).dropna()
    if width.empty:
        return []
    wide = frame.loc[width[width > WIDE].sort_values(ascending=False, kind="stable").index]
    many = f"{len(wide)} of {len(width)} exponents move by more than {WIDE:g}" if len(wide) else "No exponent moves far"
    named = f": {_names(wide)}" if len(wide) else ""
    interval = float((frame["alpha_high"] - frame["alpha_low"]).median())
    return [
        f"{many} when xmin moves to another eigenvalue that fits within 5 % as well{named}. The 95 % bootstrap "
        f"interval of alpha is {interval:.2g} wide in the median matrix."
    ]


def _names(rows: pd.DataFrame) -> str:
    rest = len(rows) - NAMED
    return ", ".join(rows["tensor"].head(NAMED)) + (f" and {rest} more" if rest > 0 else "")
