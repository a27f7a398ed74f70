"""README.md of a run: the model card, with where everything came from."""

from __future__ import annotations

from typing import Any

CARD = """---
library_name: {library}
base_model: {model[id]}
tags: [owlore, fine-tuned]
---

# {model[id]}, {config[method]}

{model[id]} fine-tuned with `owlore train --method {config[method]}` ({paper}).

| | |
| --- | --- |
| base model | {model[id]}{revision}, weights sha256 `{model[weights_sha256]:.16}` |
| data | {data[source]}, {data[rows]} rows, sha256 `{data_sha256:.16}` |
| layer table | {table} |
| blocks drawn | {draws} (periods, from the input up) |
| steps | {steps} of {config[batch]} x {config[accum]} sequences{processes}, at most {config[seq_len]} tokens each, seed {config[seed]} |
| trained share of parameters, mean over steps | {trainable:.2%} |
| held-out loss (nats a token) | {losses} |
| peak memory | {peak:.2f} GB on {device} |
| time | {seconds:.0f} s, {tokens_per_s:.0f} tokens/s |
| versions | {versions} |

{result} `config.yaml` is the whole
configuration and can be given back as `--config`; `metrics.jsonl` has one row an optimizer step; `run.json` has the
draws and the provenance.
"""  # noqa: E501

MODEL = "`model/` holds the result; load it with `AutoModelForCausalLM.from_pretrained`."
ADAPTER = """`model/` holds an adapter; `import owlore.adapters`, load the base model, then
`PeftModel.from_pretrained(base, "model")`. `owlore merge` makes a plain model of both."""


def held_out_change(run: dict[str, Any]) -> str | None:
    """Held-out loss before and after training, of the same weights.

    Args:
        run: contents of run.json. Where frozen blocks were quantised, the loss with them and the loss of what was
            exported are told apart.

    Returns:
        Text such as `2.3456 -> 2.1234`; None where no loss was measured.
    """
    before, after = run.get("eval_loss_first"), run.get("eval_loss_last")
    if before is None:
        return None
    if (quantised := run.get("eval_loss_last_frozen")) is None:
        return f"{before:.4f} -> {after:.4f}"
    form = run["residency"]["frozen"]
    return f"{before:.4f} -> {quantised:.4f} with frozen blocks in {form}, {after:.4f} as exported"


def model_card(run: dict[str, Any], *, paper: str, adapter: bool = False) -> str:
    """The card as Markdown.

    Args:
        run: contents of run.json.
        paper: reference of the method.
        adapter: whether the result is an adapter and not a model.
    """
    losses = held_out_change(run) or "not measured"
    if run.get("exported_step", run["steps"]) != run["steps"]:
        losses += (
            f"; `model/` is the best evaluation, {run['eval_best']['loss']:.4f} at step {run['eval_best']['step']}"
        )
    texts = {
        "revision": f" at {run['model']['revision']}" if run["model"].get("revision") else "",
        "data_sha256": str(run["data"]["sha256"]),
        "table": _table(run.get("table")),
        "draws": " ".join(map(str, run["draws"])),
        "processes": f" in {run['processes']} processes" if run.get("processes", 1) > 1 else "",
        "losses": losses,
        "peak": run["peak_bytes"] / 1e9,
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "paper": paper,
        "library": "peft" if adapter else "transformers",
        "result": ADAPTER if adapter else MODEL,
    }
    return CARD.format(**run | texts)


def _table(table: dict[str, Any] | None) -> str:
    """Which rule the table follows, and which weights it was made from."""
    if table is None:
        return "none: nothing is sampled"
    origin = table["model"].get("weights_sha256")
    return f"rule {table['rule'].get('name')}" + (f", from weights sha256 `{origin[:16]}`" if origin else "")
