"""The gallery: scan models, then write results.json and README.md from all scans in this folder.

python reports/scans/make.py MODEL...     scans each MODEL into a folder of its name, then writes the README
python reports/scans/make.py              writes the README again from the scans that are there
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from words import HEAD, READINGS, TAIL

HERE = Path(__file__).parent
LARGEST_SPECTRA = 300_000  # bytes; larger ones are not kept, the command above makes them again
SHUFFLES = 99_999
FEWEST = 5  # blocks that a correlation is given for
OTHERS = ("inner", "median_alpha", "alpha_hill", "lod_weight")
NOISE = 0.05  # from this p_null on a matrix cannot be told from noise


def scan_into_gallery(model: str) -> None:
    """Scan with the default calibration and every comparison with noise; one matrix at a time."""
    import htsr
    from htsr.cli import slug

    directory = HERE / slug(model)
    htsr.scan(model, out=directory, nulls=True, workers=1)
    spectra = directory / "spectra.npz"
    if spectra.exists() and spectra.stat().st_size > LARGEST_SPECTRA:
        spectra.unlink()


def correlation(a: pd.Series, b: pd.Series, shuffles: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Spearman's correlation, its two-sided permutation p, and the correlations under permutation."""
    first, second = (_standard(series.rank().to_numpy()) for series in (a, b))
    found = float(first @ second)
    null = second[shuffles] @ first
    return found, float((np.abs(null) >= abs(found) - 1e-9).mean()), null


def _standard(ranks: np.ndarray) -> np.ndarray:
    centred = ranks - ranks.mean()
    return centred / np.linalg.norm(centred)


def orders(n: int) -> np.ndarray:
    """All orders of n blocks up to n = 8, else the identity and seeded ones."""
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    rng = np.random.default_rng(0)
    return np.vstack([np.arange(n), rng.permuted(np.tile(np.arange(n), (SHUFFLES, 1)), axis=1)])


def least_significant(null: np.ndarray) -> float | None:
    """The smallest |rho| that would have p < 0.05 with so many blocks; None where even the largest has not."""
    sizes, counts = np.unique(np.round(np.abs(null), 9), return_counts=True)
    p = counts[::-1].cumsum()[::-1] / counts.sum()
    return float(sizes[p < 0.05][0]) if (p < 0.05).any() else None


def facts(directory: Path) -> dict[str, Any]:
    """The numbers of one scan that the README tells."""
    import htsr

    result = htsr.load_scan(directory)
    blocks = result.blocks
    inside = result.frame[result.frame["block"].notna() & result.frame["alpha"].notna()]
    median = inside.groupby("block")["alpha"].median().reset_index(drop=True)
    shuffles = orders(len(blocks))
    rho, p, null = correlation(blocks["lod"], blocks["alpha"], shuffles)
    inner = blocks.iloc[1:-1]
    others = {
        "inner": (inner["lod"], inner["alpha"]),
        "median_alpha": (blocks["lod"], median),
        "alpha_hill": (blocks["lod"], blocks["alpha_hill"]),
        "lod_weight": (blocks["lod_weight"], blocks["alpha"]),
    }
    return {
        "model": result.provenance["model"]["id"],
        "weights_sha256": result.provenance["model"]["weights_sha256"],
        "calibration": result.provenance["calibration"],
        "dtypes": sorted(set(inside["dtype"])),
        "blocks": len(blocks),
        **alpha_facts(inside, blocks),
        **lod_facts(blocks),
        **noise_facts(result.frame),
        "spearman": {
            "lod_alpha": {"rho": rho, "p": p, "least_significant": least_significant(null)},
            **{name: dict(zip(("rho", "p"), correlation(*pair, orders(len(pair[0])))[:2], strict=True))
               for name, pair in others.items() if pair[0].nunique() > 1 and len(pair[0]) >= FEWEST},
        },
        "seconds": result.provenance["seconds"],
        "spectra_kept": (directory / "spectra.npz").exists(),
    }  # fmt: skip


def alpha_facts(inside: pd.DataFrame, blocks: pd.DataFrame) -> dict[str, Any]:
    """Range of alpha over matrices and blocks, and by role."""
    by_role = inside.groupby("role")["alpha"].median().sort_values()
    low, high = blocks.loc[blocks["alpha"].idxmin()], blocks.loc[blocks["alpha"].idxmax()]
    return {
        "matrices": len(inside),
        "alpha_median": float(inside["alpha"].median()),
        "alpha_least": float(inside["alpha"].min()),
        "alpha_most": float(inside["alpha"].max()),
        "alpha_2_to_6": int(inside["alpha"].between(2, 6).sum()),
        "heaviest_block": {"block": int(low["block"]), "alpha": float(low["alpha"])},
        "lightest_block": {"block": int(high["block"]), "alpha": float(high["alpha"])},
        "heaviest_role": {"role": by_role.index[0], "alpha": float(by_role.iloc[0])},
        "lightest_role": {"role": by_role.index[-1], "alpha": float(by_role.iloc[-1])},
        "explained": explained(inside),
        "interval_width": float((inside["alpha_high"] - inside["alpha_low"]).median()),
        "smallest_side": int(inside[["rows", "cols"]].min(axis=1).min()),
    }


def explained(inside: pd.DataFrame) -> dict[str, float]:
    """Role's and block's shares of the variance of alpha's ranks, each with the other's effect taken out.

    Two ways with one matrix a cell; epsilon^2, so that groups without an effect have 0 on average, with p of F.
    """
    from scipy.stats import f

    grid = inside.assign(rank=inside["alpha"].rank()).pivot(index="role", columns="block", values="rank").dropna()
    ranks = grid.to_numpy(float)
    total = float(((ranks - ranks.mean()) ** 2).sum())
    roles, blocks = ranks.mean(axis=1, keepdims=True), ranks.mean(axis=0, keepdims=True)
    left = float(((ranks - roles - blocks + ranks.mean()) ** 2).sum())
    freedom = (len(ranks) - 1) * (ranks.shape[1] - 1)
    found = {}
    for name, means, count in (("role", roles, ranks.shape[1]), ("block", blocks, len(ranks))):
        between, degrees = count * float(((means - ranks.mean()) ** 2).sum()), means.size - 1
        found[name] = (between - degrees * left / freedom) / total
        found[f"{name}_p"] = float(f.sf((between / degrees) / (left / freedom), degrees, freedom))
    return found


def lod_facts(blocks: pd.DataFrame) -> dict[str, Any]:
    """Range of LOD over the blocks, and how much of it the weights alone have."""
    ranked = blocks.sort_values("lod", ascending=False)
    return {
        "lod_least": {"block": int(ranked["block"].iloc[-1]), "lod": float(ranked["lod"].iloc[-1])},
        "lod_most": {"block": int(ranked["block"].iloc[0]), "lod": float(ranked["lod"].iloc[0])},
        "lod_second": {"block": int(ranked["block"].iloc[1]), "lod": float(ranked["lod"].iloc[1])},
        "lod_weight_most": float(blocks["lod_weight"].max()),
    }


def noise_facts(frame: pd.DataFrame) -> dict[str, Any]:
    """Which matrices cannot be told from noise, and how much the fits say."""
    tested = frame[frame["p_null"].notna()]
    alike = tested[tested["p_null"] >= NOISE]
    moving = frame["alpha_most"] - frame["alpha_least"]
    return {
        "tested": len(tested),
        "like_noise": list(alike["tensor"]),
        "like_noise_2_to_6": int(alike["alpha"].between(2, 6).sum()),
        "flatter_than_noise": int((alike["p_null"] > 1 - NOISE).sum()),
        "badly_fitted": int((frame["p_gof"] < 0.1).sum()),
        "moved_by_xmin": int((moving > 1).sum()),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Spearman's correlation of LOD with alpha, a row a model."""
    lines = [
        "| model | blocks | LOD with mean alpha | p | needed for p < 0.05 | without first and last block "
        "| LOD with median alpha | LOD with PL_Alpha_Hill | LOD of weights alone with alpha |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        main, least = r["spearman"]["lod_alpha"], r["spearman"]["lod_alpha"]["least_significant"]
        others = [_cell(r["spearman"].get(name)) for name in OTHERS]
        needed = "none suffices" if least is None else f"{least:.2f}"
        row = [r["model"], str(r["blocks"]), f"**{main['rho']:+.2f}**", f"{main['p']:.2g}", needed, *others]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def shares(results: list[dict[str, Any]]) -> str:
    """How much of alpha goes with the role and how much with the block, a row a model."""
    lines = ["| model | role | p | block | p |", "| --- | ---: | ---: | ---: | ---: |"]
    for r in results:
        e = r["explained"]
        lines.append(f"| {r['model']} | {e['role']:.2f} | {e['role_p']:.1g} | {e['block']:.2f} | {e['block_p']:.2g} |")
    return "\n".join(lines)


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['rho']:+.2f} (p {found['p']:.2g})"


def section(directory: Path, r: dict[str, Any]) -> str:
    """Heading, link, what is seen, pictures."""
    flat = {k: v for k, v in r.items() if not isinstance(v, dict)}
    flat |= {f"{k}_{inner}": v for k, d in r.items() if isinstance(d, dict) for inner, v in d.items()}
    names = [name.removesuffix(".weight") for name in r["like_noise"]]
    flat |= {"num_noise": len(names), "times_second": r["lod_most"]["lod"] / r["lod_second"]["lod"]}
    flat["noise_names"] = ", ".join(f"`{name}`" for name in names)
    text = textwrap.fill(READINGS[directory.name].format(**flat), 120, break_on_hyphens=False)
    kept = "" if r["spectra_kept"] else f" (`spectra.npz` left out for its size: `make.py {directory.name}` writes it)"
    return (
        f"## {r['model']}\n\n{text}\n\nFiles: [`{directory.name}/`]({directory.name}){kept}.\n\n"
        f"![alpha by depth]({directory.name}/plots/alpha.png)\n\n![LOD by depth]({directory.name}/plots/lod.png)\n"
    )


def main(models: list[str]) -> None:
    for model in models:
        scan_into_gallery(model)
    places = [HERE / name for name in READINGS if (HERE / name / "scan.json").exists()]
    results = [facts(place) for place in places]
    quantised = json.loads((HERE / "quantisation.json").read_text())
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = HEAD.format(table=table(results), shares=shares(results)) + "\n"
    readme += "\n".join(section(place, r) for place, r in zip(places, results, strict=True))
    (HERE / "README.md").write_text(readme + "\n" + TAIL.format(**quantised))


if __name__ == "__main__":
    main(sys.argv[1:])
