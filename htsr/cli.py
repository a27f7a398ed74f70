"""The command line of htsr: parse, one library call, render. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from htsr import __version__, console
from htsr.choices import DIRECTIONS, ENGINES, PRECISIONS, RULES, SCOPES
from htsr.errors import HtsrError
from htsr.files import check_output_directory, read_json, slug

if TYPE_CHECKING:
    from htsr.scan_data import ScanData

quiet_option = click.option("--quiet", is_flag=True, help="Nothing on stderr but an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(
    cls=console.LazyGroup,
    name="htsr",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 116, "show_default": True},
)
@click.version_option(__version__, prog_name="htsr")
def cli() -> None:
    """How heavy-tailed each layer of a transformer is, how many outliers it holds, and how often to train it."""


def main() -> None:
    """The console script."""
    console.run(cli)


@cli.command()
@click.argument("model")
@click.option("-o", "--out", metavar="DIR", show_default="reports/scans/<model>", help="Where the files are written.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="Where the text runs; cuda: spectra too.")
@click.option("--precision", type=console.Choice(PRECISIONS), default="auto", help="Of the spectra; auto: fp64's fit.")
@click.option("--engine", type=console.Choice(ENGINES), default="native", help="Whose code computes the spectra.")
@click.option("--calibration", default="builtin", metavar="builtin|PATH|none", help="Text for LOD: .txt or .jsonl.")
@click.option("--tau", type=console.Numbers(), default=13.0, metavar="TAU[,TAU...]",
              help="An outlier is above tau times the mean importance; the first is the table's.")  # fmt: skip
@click.option("--lod-scope", type=console.Choice(SCOPES), default="block", help="What the mean is taken over.")
@click.option("--samples", type=int, default=32, help="Windows of calibration text.")
@click.option("--seq-len", type=int, default=512, help="Tokens in a window, at most the model's maximum.")
@click.option("--seed", type=int, default=0, help="Chooses the windows, and what --nulls draws.")
@click.option("--workers", type=int, show_default="usable cores", help="Matrices analysed side by side.")
@click.option("--nulls", is_flag=True, help="Also intervals, tests and comparisons with noise; takes longer.")
@click.option("--fresh", is_flag=True, help="Compute again what the cache has.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights; only of a source you trust.")
@click.option("--revision", metavar="REV", help="Of a Hugging Face id.")
@click.option("--base", metavar="MODEL", help="Scan the difference to it; for an adapter, the two merged.")
@click.option("--no-plots", is_flag=True, help="Write no pictures.")
@json_option
@quiet_option
def scan(model: str, out: str | None, no_plots: bool, as_json: bool, **options: Any) -> None:
    """Scan MODEL: a directory (an adapter's too), a .safetensors or .gguf file, a Hugging Face id, or `demo`."""
    from htsr.render import json_text, render_scan, scan_record
    from htsr.scanner import scan as run_scan

    name = slug(model) if options["base"] is None else f"{slug(model)}-against-{slug(options['base'])}"
    directory = Path(out) if out is not None else Path("reports/scans") / name
    check_output_directory(directory)
    result = run_scan(model, out=directory, plots=not no_plots, **options)
    print_notices(result, quiet=options["quiet"])
    if as_json:
        saved = read_json(directory / "scan.json", expected="the scan's record")  # it knows the time of the plots
        click.echo(json_text({"out": str(directory), **scan_record(result), **saved}))
    else:
        click.echo(render_scan(result))
        click.echo(f"\nwritten to {directory}/ (report.html, scan.csv, blocks.csv, table.json, scan.json)")


@cli.command()
@click.argument("scan_dir")
@click.option("--rule", type=console.Choice(RULES), show_default="lod where there is one, else alpha", help="Scores.")
@click.option("--direction", type=console.Choice(DIRECTIONS), default="heavy", help="Of rule alpha: what scores more.")
@click.option("--gamma", type=int, default=5, help="Blocks in a draw.")
@click.option("--temperature", type=float, default=1.0, help="Above 1 flattens the scores, below 1 sharpens them.")
@click.option("--floor", type=float, default=0.0, help="Lower bound on every inclusion.")
@click.option("-o", "--output", metavar="FILE", show_default="stdout", help="Where the table is written.")
@quiet_option
def table(scan_dir: str, output: str | None, quiet: bool, **options: Any) -> None:
    """Make a layer table of the scan in SCAN_DIR."""
    from htsr.render import json_text, render_table
    from htsr.result import load_scan

    made = load_scan(scan_dir).table(**options)
    if made.note:
        console.notice(made.note, quiet=quiet)
    if output is None:
        click.echo(json_text(made.to_dict()))
    else:
        made.save(output)
        click.echo(f"{render_table(made)}\n\nwritten to {output}")


@cli.command()
@click.argument("scan_a")
@click.argument("scan_b")
@click.option("--models", nargs=2, metavar="A B", help="The scanned models: adds the overlap of singular vectors.")
@click.option("--rank", type=int, default=10, help="Leading singular vectors that are compared.")
@click.option("-o", "--out", metavar="DIR", show_default="nothing is written", help="For compare.csv and pictures.")
@json_option
@quiet_option
def compare(
    scan_a: str, scan_b: str, models: tuple[str, str] | None, rank: int, out: str | None, as_json: bool, quiet: bool
) -> None:
    """Compare two scans, SCAN_A and SCAN_B, matrix by matrix."""
    from htsr.comparison import compare as compare_scans
    from htsr.render import json_text, records, render_comparison
    from htsr.result import load_scan
    from htsr.store import save_comparison

    if out is not None:
        check_output_directory(Path(out))
    a, b = load_scan(scan_a), load_scan(scan_b)
    matrices = compare_scans(a, b, models=models or None, rank=rank, quiet=quiet)
    if out is not None:
        save_comparison(a, b, matrices, Path(out))
    if as_json:
        identities = {name: scan.provenance.get("model") for name, scan in (("a", a), ("b", b))}
        click.echo(json_text({**identities, "matrices": records(matrices)}))
    else:
        click.echo(render_comparison(a, b, matrices))
        if out is not None:
            click.echo(f"\nwritten to {out}/ (compare.csv and pictures)")


@cli.command()
@click.argument("path", metavar="SCAN_DIR|TABLE")
@json_option
@quiet_option
def show(path: str, as_json: bool, quiet: bool) -> None:
    """Show the scan in a directory, or a layer table."""
    from htsr.layer_table import LayerTable
    from htsr.render import json_text, render_scan, render_table, scan_record
    from htsr.result import load_scan

    if (Path(path).is_dir() and not (Path(path) / "table.json").is_file()) or (Path(path) / "scan.csv").is_file():
        result = load_scan(path)
        print_notices(result, quiet=quiet)
        click.echo(json_text(scan_record(result)) if as_json else render_scan(result))
        return
    made = LayerTable.load(path)
    click.echo(json_text(made.to_dict()) if as_json else render_table(made))


@cli.command()
@click.argument("model")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights; only of a source you trust.")
@click.option("--revision", metavar="REV", help="Of a Hugging Face id.")
@json_option
@quiet_option
def verify(model: str, as_json: bool, **options: Any) -> None:
    """Check the numbers of MODEL against weightwatcher, matrix by matrix; fails when a row differs."""
    from htsr.render import json_text, records, render_verification
    from htsr.verify import verify as verify_model

    rows = verify_model(model, **options)
    click.echo(json_text({"rows": records(rows)}) if as_json else render_verification(rows))
    if differing := int((~rows["agrees"]).sum()):
        raise HtsrError(f"{differing} of {len(rows)} matrices differ from weightwatcher")


def print_notices(result: ScanData, *, quiet: bool) -> None:
    """Print what a user must not overlook: failed matrices, and a table that could not follow its scores."""
    failed = result.frame[result.frame["status"] == "failed"]
    if len(failed):
        first = failed.iloc[0]
        which = "1 matrix failed," if len(failed) == 1 else f"{len(failed)} matrices failed, the first"
        console.notice(f"{which} {first['tensor']}: {first['reason']}", quiet=quiet)
    if result.default_table is not None and result.default_table.note:
        console.notice(result.default_table.note, quiet=quiet)
