"""The page, table and plots of a study, from its results alone: nothing is trained, no model is read.

python reports/studies/methods/report.py reports/studies/methods/demo.yaml
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import draw
from analyse import Arm, Difference, choose, chosen, difference, rank, read_results
from study import Study, read_study


def main() -> None:
    for name in sys.argv[1:]:
        write(read_study(name))


def write(study: Study) -> None:
    """README.md, table.csv and plots/ of the study."""
    results = read_results(study.directory / "results")
    scan = json.loads((study.directory / "tables" / "scan.json").read_text())
    if not any(result["status"] == "finished" for result in results):
        raise SystemExit(f"{study.path}: no run has finished yet")
    arms, left_out = rank(results, study.learning_rates, study.tuning_seed)
    swept = choose(results, study.learning_rates, study.tuning_seed)
    by_name = {arm.name: arm for arm in arms}
    reference = by_name.get(study.spec["reference"])
    rows = [row(arm, reference, study) for arm in arms]
    with (study.directory / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["arm"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    pictures = draw.all_plots(study, arms, study.directory / "plots") if arms else []
    page = "\n".join([
        *head(study, results, scan), *table(rows), "", *outside(left_out, study, results),
        *answers(study, by_name, scan), *sweep(study, swept), *shown(pictures), *limits(study),
    ])  # fmt: skip
    (study.directory / "README.md").write_text(page + "\n")
    print(f"{study.directory}/README.md: {len(arms)} arms ranked, {len(left_out)} left out")


def row(arm: Arm, reference: Arm | None, study: Study) -> dict[str, Any]:
    """A line of the table, as plain values."""
    losses = list(arm.values("test_loss").values())
    gap = difference(arm, reference) if reference is not None and arm is not reference else None
    first = next(iter(arm.runs.values()))
    return {
        "arm": arm.name,
        "method": first["method"],
        "lr": arm.lr,
        "lr_at_edge": arm.at_edge,
        "seeds": len(arm.runs),
        "test_loss": statistics.fmean(losses),
        "test_loss_sd": statistics.stdev(losses),
        "difference": None if gap is None else gap.mean,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "exact": arm.mean("exact"),
        "trainable": arm.mean("trainable"),
        "state_bytes": round(arm.mean("peak_bytes", "state")),
        "peak_bytes": round(arm.peak_bytes),
        "seconds": arm.seconds,
        "on_gpu": arm.on_gpu,
        "scan_cpu_seconds": arm.mean("seconds", "scan_cpu"),
        "tokens": round(arm.mean("tokens")),
    }


MACHINE = "2-core AMD EPYC shared with other work, one thread a run"
ON_CPU = (
    "CPU: seconds of the whole run on the processor, loading, two evaluations, export and the scan of its table "
    "included; wall clock on this machine would measure the others' work. State: masters, moments and projectors as "
    "counted, the most of the run; resident: how far the process grew at most, libraries included."
)
ON_GPU = (
    "s: seconds of the whole run, loading, two evaluations and export included, by the clock while other runs shared "
    "the card, and the processor's seconds of the scan of its table. State: masters, moments and projectors as "
    "counted, the most of the run; peak: the most that was allocated on the card, the weights included."
)


def head(study: Study, results: Sequence[dict[str, Any]], scan: dict[str, Any]) -> list[str]:
    settings, rows = study.spec["settings"], scan["rows"]
    path = f"reports/studies/methods/{study.path.name}"
    versions = next(r["versions"] for r in results if r["status"] == "finished")
    swept, reported = (
        {r["commit"] for r in results if (r["seed"] == study.tuning_seed) == tuning} for tuning in (1, 0)
    )
    return [
        f"# {study.spec.get('title', study.path.stem)}",
        "",
        "Made by `report.py` from the files in `results/`: one a run, with its command, seed, draws and loss curve.",
        "",
        "```sh",
        f"OMP_NUM_THREADS=1 python reports/studies/methods/run.py {path} --workers 2   # goes on where it stopped",
        f"python reports/studies/methods/report.py {path}                              # this page",
        "```",
        "",
        f"Model `{study.spec['model']}` ({scan['model']['num_blocks']} blocks), {rows['train']} rows to train on, "
        f"{rows['validation']} to choose the learning rate by, {rows['test']} to report; "
        f"{rows['removed_as_asked_later']} rows whose question is asked later were removed from training. Every arm: "
        f"{settings['steps']} steps of {settings['batch']} rows in the same order for the same seed (equal tokens, "
        f"checked), the learning rates {', '.join(f'{lr:g}' for lr in study.learning_rates)} ({settings['schedule']}, "
        f"{settings.get('warmup', 0)} steps of warm-up), gamma {settings.get('active', '-')}, "
        f"K {settings.get('every', '-')}, rank {settings.get('rank', '-')} where it samples or projects. "
        f"{len(results)} of {study.num_cells} runs are in. "
        f"{study.spec.get('machine', MACHINE)}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; "
        f"commits of the sweep {', '.join(sorted(swept))}; of the reported runs {', '.join(sorted(reported))}.",
        "",
        "## Result",
        "",
        f"Every arm was swept over all learning rates with seed {study.tuning_seed}; the validation rows chose one. "
        "The table is of other seeds at that rate: test loss in nats a token of the answers (lower is better), mean "
        "and standard deviation; `*`: the rate is at an end of the sweep, a better one may lie beyond. "
        f"Difference: to {study.spec['reference']}, paired by seed, with its 95 % t interval. Exact: share of test "
        "questions that greedy decoding answers word for word. "
        + (ON_GPU if any("device" in r.get("peak_bytes", ()) for r in results) else ON_CPU),
        "",
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["No arm has all its runs yet; the matrix is still being run."]
    peak, clock = ("peak", "s") if rows[0]["on_gpu"] else ("resident", "CPU s")
    lines = [
        f"| arm | lr | test loss | difference | exact | trained | state MB | {peak} MB | {clock} | of it scan |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        gap = ""
        if one["difference"] is not None:
            low, high = one["difference_low"], one["difference_high"]
            gap = interval(Difference(mean=one["difference"], low=low, high=high, seeds=one["seeds"]))
        lines.append(
            f"| {one['arm']} | {one['lr']:g}{'*' if one['lr_at_edge'] else ''} "
            f"| {one['test_loss']:.4f} ± {one['test_loss_sd']:.4f} | {gap} | {one['exact']:.3f} "
            f"| {one['trainable']:.1%} | {one['state_bytes'] / 1e6:.2f} | {one['peak_bytes'] / 1e6:.0f} "
            f"| {one['seconds']:.1f} | {one['scan_cpu_seconds']:.1f} |"
        )
    return lines


def interval(gap: Difference) -> str:
    return f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def outside(left_out: dict[str, str], study: Study, results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {name}: {why}" for name, why in sorted(left_out.items())]
    lines += [f"- {name}: not run" for name in study.arms if name not in {r["arm"] for r in results}]
    failed = [r for r in results if r["status"] != "finished"]
    lines += [f"- {r['cell']} failed: {r['error']}" for r in failed]
    return ["Left out of the ranking:", "", *lines, ""] if lines else []


def answers(study: Study, arms: dict[str, Arm], scan: dict[str, Any]) -> list[str]:
    """The questions of the YAML file, each answered by its paired difference; what is not complete stays open."""
    if not study.spec.get("questions"):
        return []
    lines = ["## Answers", "", "| question | first less second | answer |", "| --- | --- | --- |"]
    for one, other, text in study.spec.get("questions", ()):
        if one not in arms or other not in arms:
            lines.append(f"| {text} | {one} less {other} | open: runs are missing |")
            continue
        gap = difference(arms[one], arms[other])
        lines.append(f"| {text} | {one} less {other}: {interval(gap)}, {gap.seeds} seeds | {one} is {worded(gap)} |")
    return [*lines, "", *paragraph(arms, scan), ""]


def worded(gap: Difference) -> str:
    return {"better": "**better**", "worse": "**worse**"}.get(gap.verdict, "neither better nor worse, as far as seen")


def paragraph(arms: dict[str, Arm], scan: dict[str, Any]) -> list[str]:
    """What the study says about layer tables, in words that follow from the intervals."""
    need = {"owlore-lod", "owlore-uniform", "owlore-decrease", "owlore-alpha-heavy", "owlore-alpha-light"}
    if not need <= set(arms):
        return []
    lod, uniform, decrease = arms["owlore-lod"], arms["owlore-uniform"], arms["owlore-decrease"]
    heavy, light = arms["owlore-alpha-heavy"], arms["owlore-alpha-light"]
    cost = scan["tables"]["lod"]["scan_cpu_seconds"]
    per_run = uniform.mean("seconds", "call_cpu")
    alpha_cost = scan["tables"]["alpha-heavy"]["scan_cpu_seconds"]
    tables = sorted((lod, uniform, decrease, heavy, light), key=lambda arm: arm.mean("test_loss"))
    order = ", ".join(f"{arm.name.removeprefix('owlore-')} {arm.mean('test_loss'):.4f}" for arm in tables)
    return [
        f"The five tables from best to worst by mean test loss: {order}. "
        f"Does the LOD table beat uniform draws? {said(difference(lod, uniform))} "
        f"Does it beat draws that fall with depth? {said(difference(lod, decrease))} Does alpha help? "
        f"Heavy tails first against uniform: {said(difference(heavy, uniform))} "
        f"Light tails first against uniform: {said(difference(light, uniform))} "
        f"In which direction? Heavy against light: {said(difference(heavy, light))} At what cost? The LOD table takes "
        f"{cost:.1f} CPU seconds once, {cost / per_run:.0%} of a run of this length; a table by alpha "
        f"{alpha_cost:.1f}. Inclusion by block: LOD {shares(scan, 'lod')}; alpha heavy {shares(scan, 'alpha-heavy')}; "
        f"alpha light {shares(scan, 'alpha-light')}."
    ]


def said(gap: Difference) -> str:
    """A difference of test losses as a sentence."""
    sizes = f"{gap.mean:+.4f} nats, 95 % interval {gap.low:+.4f} to {gap.high:+.4f}, {gap.seeds} seeds"
    if gap.verdict == "better":
        return f"Yes ({sizes})."
    if gap.verdict == "worse":
        return f"No, it is worse ({sizes})."
    return f"Not shown ({sizes})."


def shares(scan: dict[str, Any], name: str) -> str:
    return " ".join(f"{share:.2f}" for share in scan["tables"][name]["inclusion"])


def sweep(study: Study, losses: dict[str, dict[float, float]]) -> list[str]:
    """Validation loss of every arm at every learning rate, so that a badly tuned arm can be seen."""
    rates = sorted(study.learning_rates)
    lines = ["## The sweep", "", "Validation loss at each learning rate, tuning seed.", "",
             "| arm | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "| --- |" + " --- |" * len(rates)]  # fmt: skip
    for name in study.arms:
        known = losses.get(name, {})
        best = chosen(known, rates) if known else None
        cells = [
            "" if lr not in known else f"**{known[lr]:.4f}**" if lr == best else f"{known[lr]:.4f}" for lr in rates
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def shown(pictures: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["## Pictures", ""] if pictures else []
    for name, caption in pictures:
        lines += [caption, "", f"![{caption}](plots/{name})", ""]
    return lines


def limits(study: Study) -> list[str]:
    lines = [
        "AGIEval and PubMedQA, which the OwLore paper reports, have no data here and are not measured.",
        f"One seed chose the learning rates, from {len(study.learning_rates)}; all arms alike.",
        *study.spec.get("note", ()),
    ]
    return ["## What falls short", "", *(f"- {line}" for line in lines)]


if __name__ == "__main__":
    main()
