"""The command line of owlore: parse, one library call, render. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from htsr import console
from htsr.errors import NotFound, OutOfMemory, UsageError, nearest
from owlore import render
from owlore.choices import METHODS
from owlore.config import SETTINGS, TrainConfig, find_config, flag_name
from owlore.options import bytes_of


@click.group(
    cls=console.LazyGroup,
    lazy={"eval": "owlore.evaluation.cli:command"},
    name="owlore",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 116},
)
@click.version_option(package_name="htsr-owlore", prog_name="owlore")
def cli() -> None:
    """Fine-tune a causal language model a few blocks at a time, by a table of its layers."""


def main() -> None:
    """The console script."""
    console.run(cli)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
quiet_option = click.option("--quiet", is_flag=True, help="Nothing on stderr but an error.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all settings of `TrainConfig`, and `--config`, as options; those not given are None."""
    command = click.option(
        "--config", "file", metavar="FILE.yaml", help="Settings from a file, or the name of a packaged recipe."
    )(command)
    for name, spec in reversed(SETTINGS.items()):
        if spec.metadata.get("argument"):
            command = click.argument(name, required=False)(command)
            continue
        flags = ("-o", "--out") if name == "out" else (flag_name(name),)
        command = click.option(*flags, name, **_click_settings(name))(command)
    return command


def _click_settings(name: str) -> dict[str, Any]:
    """Values reach `TrainConfig` as they were typed: its parsers are the only ones."""
    spec = SETTINGS[name]
    parser, help_text = spec.metadata["parser"], spec.metadata["help"]
    if not parser.metavar:
        return {"is_flag": True, "default": None, "help": help_text}
    shown: dict[str, Any] = {"default": None, "type": click.UNPROCESSED, "metavar": parser.metavar}
    if parser.repeated:
        return shown | {"multiple": True, "help": help_text}
    if parser.metavar.startswith("["):  # the value may be left out
        shown |= {"is_flag": False, "flag_value": True}
    elif spec.default is not None:
        default = "none" if spec.default == () else spec.default
        help_text += f" [default: {default:g}]" if isinstance(default, float) else f" [default: {default}]"
    return shown | {"help": help_text}


@cli.command()
@train_options
def train(file: str | None, **options: Any) -> None:
    """Fine-tune MODEL. Settings come from the defaults, then --config, then the command line."""
    config = _config(file, options, needs=("model", "data"))
    from owlore.run.api import train_from_config

    run = train_from_config(config)
    if config.json and run.leads:
        click.echo(jsonlib.dumps({"directory": str(run.directory), **run.record}))
    elif run.leads:
        click.echo(render.run_text(run.directory, run.record))


def _config(file: str | None, options: dict[str, Any], *, needs: tuple[str, ...]) -> TrainConfig:
    """The configuration of a command line.

    Args:
        file: what `--config` names.
        options: values of all options by setting, None or () where not given.
        needs: settings that the command cannot do without.

    Raises:
        UsageError: one of `needs` is missing.
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    resumed = _resumed(given) if file is None and "model" not in given else None
    config = TrainConfig.build(given, find_config(file) if file else resumed)
    for name in needs:
        if getattr(config, name) is None:
            raise UsageError(f"{flag_name(name)} is missing; expected it on the command line or in --config")
    return config


def _resumed(given: dict[str, Any]) -> Path | None:
    """The configuration file of the run that --resume names; its settings hold where none are given."""
    named = given.get("resume")
    directory = Path(named) if isinstance(named, str) else Path(given["out"]) if named and "out" in given else None
    if directory is None:
        return None
    if not directory.is_dir():
        raise NotFound(f"--resume {directory}: no such run directory")
    run = directory.parent.parent if directory.parent.name == "checkpoints" else directory
    return found if (found := run / "config.yaml").is_file() else None


@cli.command()
@train_options
@click.option("--fit", metavar="SIZE", help="Find the cheapest settings whose peak is at most SIZE, as 8GB or 7.5GiB.")
@click.option("--bus", metavar="GB/S", type=click.FloatRange(0, min_open=True), help="Host to device.  [default: 25]")
@click.option(
    "--tflops", metavar="X", type=click.FloatRange(0, min_open=True), help="The device's speed.  [default: 165]"
)
@click.option("--processes", type=click.IntRange(1), default=1, help="Processes of the run; bytes are of each.")
def plan(
    file: str | None, fit: str | None, bus: float | None, tflops: float | None, processes: int, **options: Any
) -> None:
    """Plan what training MODEL with these options would need; nothing is trained and no weights are read.

    Bus and speed are measured where a CUDA device is present and they are not given.
    """
    config = _config(file, options, needs=("model",))
    limit = None if fit is None else bytes_of(fit, "--fit")
    if limit is not None and processes > 1:
        raise UsageError("got --fit and --processes, expected one of them: what is found is for one process")
    from owlore.plan.device_rates import rates_for
    from owlore.plan.fit import fit_from_config
    from owlore.plan.planner import plan_from_config

    rates, notify = rates_for(config.device, bus=bus, tflops=tflops), partial(console.notice, quiet=config.quiet)
    if limit is None:
        made = plan_from_config(config, notify, rates, advice=True, processes=processes).to_dict()
        click.echo(jsonlib.dumps(made) if config.json else render.plan_text(made))
        return
    found = fit_from_config(config, limit, notify, rates)
    made = found.plan.to_dict() | {"fit": found.to_dict()}
    click.echo(jsonlib.dumps(made) if config.json else f"{render.fit_text(made['fit'])}\n\n{render.plan_text(made)}")
    if not made["fit"]["fits"]:
        raise OutOfMemory(f"--fit {fit}: nothing fits, the least is {render.size_text(made['bytes']['total'])}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--out", metavar="DIR", help="Write loss-by-step.png and loss-by-time.png there.")
@json_option
def compare(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Compare finished runs: held-out loss, time, memory."""
    from owlore.compare import begun_quantised, compare_runs, data_differ

    table = compare_runs(runs)
    if data_differ(runs):
        console.notice("note: the runs used different data; their losses cannot be compared")
    if mixed := begun_quantised(runs):
        console.notice(f"note: before is with quantised frozen blocks, after as exported: {', '.join(mixed)}")
    if out is not None:
        _save_comparison(runs, Path(out))
    click.echo(jsonlib.dumps({"runs": table}) if as_json else render.comparison_text(table))


def _save_comparison(runs: tuple[str, ...], out: Path) -> None:
    from htsr.plots import new_axes
    from owlore.compare import plot_held_out

    out.mkdir(parents=True, exist_ok=True)
    for against, name in (("step", "loss-by-step"), ("seconds", "loss-by-time")):
        axes: Any = plot_held_out(runs, new_axes(7.2, 4.0), against=against)
        axes.figure.savefig(out / f"{name}.png", dpi=150)


@cli.command()
@click.option(
    "-o", "--out", default="owlore-demo", metavar="DIR", help="Where everything is written. [default: owlore-demo]"
)
@json_option
@quiet_option
def demo(out: str, as_json: bool, quiet: bool) -> None:
    """Scan, fine-tune and compare the packaged model, in under two minutes."""
    from owlore.demo import run_demo

    run_demo(Path(out), quiet=quiet, json=as_json)


@cli.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or describe the method NAME."""
    if name is not None and name not in METHODS:
        raise UsageError(f"no method {name!r}{nearest(name, METHODS)}")
    from owlore.strategies import STRATEGIES

    facts = {key: render.method_facts(STRATEGIES[key]) for key in ([name] if name else METHODS)}
    if as_json:
        click.echo(jsonlib.dumps(facts))
    elif name is None:
        click.echo(render.methods_text(facts))
    else:
        click.echo(render.method_text(name, facts[name]))


@cli.command()
@click.argument("adapter", metavar="RUN|ADAPTER")
@click.option("-o", "--out", required=True, metavar="DIR", help="Where the merged model is written.")
@device_option
@json_option
@quiet_option
def merge(adapter: str, out: str, device: str, as_json: bool, quiet: bool) -> None:
    """Make a plain model of an adapter and its base, in fp32 from the unquantised base."""
    del quiet  # console.Command reads it
    from owlore.merge import merge as make
    from owlore.models.loading import pick_device

    made = make(adapter, out, device=pick_device(device)).to_dict()
    click.echo(jsonlib.dumps(made) if as_json else render.merge_text(made))


@cli.command()
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT", help="What the model goes on from.")
@click.option("--chat", "form", flag_value="chat", help="Put the prompt into the model's chat template.")
@click.option("--alpaca", "form", flag_value="alpaca", help="Put the prompt into the Alpaca prompt, as in training.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Token limit.",
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, metavar="X", help="0, the default, is greedy.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Seed of the sampling.")
@device_option
@json_option
@quiet_option
def generate(
    model: str, prompt: str, form: str | None, device: str, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Print what MODEL, the model of a run directory or an adapter writes after a prompt."""
    del quiet  # console.Command reads it
    from owlore.generate import generate as write
    from owlore.models.loading import pick_device
    from owlore.models.trained import load_trained

    loaded = load_trained(model, device=pick_device(device))
    text = write(loaded.model, loaded.tokenizer, prompt, form=form or "plain", **settings)
    click.echo(jsonlib.dumps({"model": model, "prompt": prompt, "text": text}) if as_json else text)
