"""Texts that `owlore` prints: each function takes what `--json` would print and returns the text for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from owlore.config import SETTINGS, as_typed, flag_name, shown


def size_text(size: float) -> str:
    """Bytes as MB or GB (powers of ten)."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def run_text(directory: Path, record: dict[str, Any]) -> str:
    """The end of a run in a few lines."""
    from owlore.run.model_card import held_out_change

    measured = held_out_change(record)
    change = "not measured (give --eval-data)" if measured is None else f"{measured} (nats a token)"
    lines = {
        "held-out loss": change,
        "peak memory": size_text(record["peak_bytes"]),
        "speed": f"{record['tokens_per_s']:,.0f} tokens/s, {record['median_step_seconds']:.3g} s a step (median)",
        "trained": f"{record['trainable']:.2%} of the parameters in a step, on average",
        "model": str(directory / "model"),
        "run": str(directory),
    }
    if record.get("exported_step", record.get("steps")) != record.get("steps"):
        best = record["eval_best"]
        lines["model"] += f" (the best evaluation: {best['loss']:.4f} at step {best['step']})"
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


HOST = {
    "locked": "of host memory are page-locked",
    "overlay": "when every block was trained: in host memory or, where that is short, on the disk",
}


def plan_text(made: dict[str, Any]) -> str:
    """Bytes by kind, the two shares and what a step takes, in a few lines."""
    depth, share, step = made["backward_depth"], made["trainable"], made["step"]
    lines = [f"{kind:<12} {size_text(size):>12}" for kind, size in made["bytes"].items()]
    lines[-1] += "   at the peak; the kinds do not all peak at one moment"
    host = [f"{kind:<12} {size_text(size):>12}   {HOST.get(kind, 'in host memory')}"
            for kind, size in made.get("host", {}).items() if size]  # fmt: skip
    return "\n".join(
        [
            *lines,
            *host,
            "",
            f"trained      {share['per_step']:>12.2%} of the parameters in a step, {share['always_on']:.2%} always",
            f"backward     {depth['expected']:>12.1f} of {depth['blocks']:g} blocks deep on average",
            f"compute      {made['compute']['of_full']:>12.2f} of full fine-tuning's multiplications in a step",
            *step_text(step),
            *_advice_lines(made["advice"]),
        ]
    )


def _advice_lines(advice: list[dict[str, Any]]) -> list[str]:
    """What other settings would save, the most first; savings do not add up."""
    if not advice:
        return []
    width = max(len(piece["change"]) for piece in advice)
    rows = [f"  {piece['change']:<{width}} {size_text(piece['saves']):>12}   {piece['price']}" for piece in advice]
    return ["", "what would lower the peak, each alone:", *rows]


def step_text(step: dict[str, Any]) -> list[str]:
    """Seconds of a step, and whether its copies are hidden behind the compute."""
    source = "measured" if step["measured"] else "assumed"
    rates = f"{source}: {step['tflops']:.3g} TFLOP/s, {step['bus_gb_s']:.3g} GB/s"
    lines = [f"seconds      {step['compute_seconds']:>10.3g} s a step of {step['tokens']:,} tokens ({rates})"]
    if not step["loads"]:
        return lines
    hidden = "hidden behind the compute" if step["hidden"] else f"{step['stall_seconds']:.3g} s of them not hidden"
    return [
        *lines,
        f"copies       {step['copy_seconds']:>10.3g} s a step: {step['loads']:.1f} blocks, {size_text(step['bytes'])}, "
        f"{hidden}; hidden from {step['hidden_from']:,} tokens a step",
    ]


def fit_text(fit: dict[str, Any]) -> str:
    """What to change, and what it costs."""
    changes = fit["options"] or "nothing: these settings fit as they are"
    if fit["fits"]:
        return f"fits {size_text(fit['limit'])} with  {changes}\n{'':<5}{fit['cost']}"
    return f"nothing fits {size_text(fit['limit'])}; the least is with  {changes}"


def comparison_text(table: list[dict[str, Any]]) -> str:
    """The rows of `owlore.compare.compare_runs` aligned, best held-out loss first."""
    width = max(len(row["run"]) for row in table)
    head = f"{'run':<{width}}  method    steps  before   after  trained   s/step   tok/s        peak       state"
    lines = [head]
    for row in sorted(table, key=lambda row: (row["loss_after"] is None, row["loss_after"] or 0.0)):
        before, after = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("loss_before", "loss_after"))
        lines.append(
            f"{row['run']:<{width}}  {row['method']:<8} {row['steps']:>6} {before:>7} {after:>7} "
            f"{row['trainable']:>8.2%} {row['seconds_per_step']:>8.3g} {row['tokens_per_s']:>7,.0f} "
            f"{size_text(row['peak_bytes']):>11} {size_text(row['peak_state_bytes']):>11}"
        )
    return "\n".join(lines)


def method_facts(strategy: Any) -> dict[str, Any]:
    """Facts about a method: its text, the options it accepts with their defaults, the paper's settings."""
    usual = {name: spec.default for name, spec in SETTINGS.items()} | dict(strategy.defaults)
    if strategy.table is not None:
        usual["table"] = strategy.table
    accepted = [name for name in SETTINGS if name in strategy.accepted_options or name in strategy.defaults]
    return {
        "summary": strategy.summary,
        "paper": strategy.paper,
        "share": strategy.share,
        "memory": strategy.memory,
        "text": " ".join((strategy.__doc__ or "").split()),
        "options": {name: usual[name] for name in accepted},
        "set": {
            key: {"default": one.default, "values": one.parser.metavar, "help": one.help}
            for key, one in strategy.method_options.items()
        },
        "preset": dict(strategy.preset),
    }


def methods_text(facts: dict[str, Any]) -> str:
    """Two lines a method: what it does, then what it trains and holds."""
    return "\n".join(
        f"{key:<8} {fact['summary']} ({fact['paper']})\n{'':<8}   trains {fact['share']}; holds {fact['memory']}"
        for key, fact in facts.items()
    )


def method_text(name: str, facts: dict[str, Any]) -> str:
    """The description of one method."""
    lines = [f"{name}: {facts['summary']} ({facts['paper']})", "", click.wrap_text(facts["text"], 100), ""]
    lines += [f"trains {facts['share']}", f"holds  {facts['memory']}", ""]
    lines.append("options it reads beyond the common ones:" if facts["options"] else "it reads the common options only")
    for key, value in facts["options"].items():
        default = "" if value is None else f" [default: {shown(value)}]"
        help_text = SETTINGS[key].metadata["help"].split(" [default")[0]
        lines.append(f"  {flag_name(key):<14} {help_text}{default}")
    if facts["set"]:
        lines += ["", "its own options, each as --set KEY=VALUE:"]
    for key, one in facts["set"].items():
        default = "" if one["default"] is None else f" [default: {shown(one['default'])}]"
        lines.append(f"  {key:<14} {one['values']}: {one['help']}{default}")
    if facts["preset"]:
        general = as_typed({k: v for k, v in facts["preset"].items() if k != "set"})
        options = [f"--set {k}={shown(v)}" for k, v in facts["preset"].get("set", {}).items()]
        lines += ["", "--preset paper: " + " ".join([general, *options])]
    return "\n".join(lines)


def merge_text(made: dict[str, Any]) -> str:
    """What was merged, and how far the result lies from the adapter on its base."""
    return "\n".join(
        [
            f"{made['matrices']} matrices of {made['base']} merged into {made['directory']}",
            f"logits against the adapter on its base: at most {made['max_difference']:.3g} apart "
            f"(largest logit {made['max_logit']:.3g}), the best token is the same in {made['same_best']:.1%}",
        ]
    )
