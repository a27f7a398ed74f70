"""The two notebooks from the cells below, executed on the demo model.

OMP_NUM_THREADS=1 python reports/notebooks/make.py            (needs the extra `notebook`)
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LARGEST = 400_000  # bytes of a notebook with its outputs

LAYER_STATISTICS = [
    """# Layer statistics

How heavy-tailed is each weight matrix, how many outliers does each block hold, and how sure are we? Everything runs on
the small model that comes with the package; put the name of your own into `MODEL`.""",
    """%matplotlib inline
import htsr

MODEL = "demo"
scan = htsr.scan(MODEL, nulls=True, samples=8, seq_len=256, workers=1, quiet=True)
scan""",
    """`scan.frame` has a row a tensor and the columns of `scan.csv`. What has no spectrum, such as a vector, keeps its
row with the reason.""",
    """columns = ["block", "role", "rows", "cols", "alpha", "alpha_low", "alpha_high", "n_tail", "lod", "p_null"]
scan.frame.loc[scan.frame["status"] == "ok", columns].head(8).round(3)""",
    "## By depth\n\nDots are matrices, the line is the mean of a block. Smaller alpha, heavier tail.",
    "scan.plot.alpha().figure",
    """LOD is the share of weights whose importance |W|·‖X‖ is above 13 times their block's mean; the dots count by the
weights alone.""",
    "scan.plot.lod().figure",
    "scan.plot.heatmap().figure",
    """## One matrix

The spectrum of the matrix with the heaviest tail: eigenvalues of W^T W, the fitted power law from xmin on, and the
noise that its bulk was fitted with.""",
    """ranked = scan.frame.dropna(subset=["alpha", "block"]).sort_values("alpha")
tensor = ranked["tensor"].iloc[0]
scan.plot.esd(tensor).figure""",
    """xmin was chosen where the Kolmogorov-Smirnov distance is smallest. How much hangs on that choice? Every xmin in
the band fits as well, within 5 %.""",
    "scan.plot.ks(tensor).figure",
    "The fit by hand, on the same eigenvalues:",
    """eigenvalues = scan.spectra[tensor]
fit = htsr.fit_power_law(eigenvalues[eigenvalues > 1e-5])  # the cut belongs to the scan
assert abs(fit.alpha - ranked["alpha"].iloc[0]) < 1e-12
fit""",
    """## Is it real?

A random matrix has an alpha too. Two hundred eigenvalues of pure noise, fitted:""",
    """import numpy as np

noise = np.random.default_rng(0).normal(size=(512, 200)) / 512**0.5
htsr.fit_power_law(htsr.eigenvalues(noise))""",
    """Therefore `--nulls`: `p_null` asks whether the same entries in random order have a largest eigenvalue as large,
the interval comes from a bootstrap that chooses xmin anew each time, and `alpha_least` to `alpha_most` is the range
over equally good xmin. The widest of them are no numbers to rank by:""",
    """doubt = scan.frame.assign(range=scan.frame["alpha_most"] - scan.frame["alpha_least"])
doubt = doubt.sort_values("range", ascending=False)
columns = ["tensor", "alpha", "alpha_low", "alpha_high", "alpha_least", "alpha_most", "p_gof", "p_null"]
doubt[columns].head(6).round(3)""",
    """## Two models, or two states of one

What did a change do? Here 0.2 % noise on the weights; with your own models, before and after fine-tuning.""",
    """import torch
from transformers import AutoModelForCausalLM

from htsr.model.locate import locate

model = AutoModelForCausalLM.from_pretrained(locate(MODEL))
generator = torch.Generator().manual_seed(0)
state = {
    name: weight + 0.002 * weight.std() * torch.randn(weight.shape, generator=generator)
    for name, weight in model.state_dict().items()
    if weight.ndim == 2 and name != "lm_head.weight"  # tied to the embeddings
}
shaken = htsr.scan(state, calibration=None, workers=1, quiet=True)
difference = htsr.compare(scan, shaken)
moved = difference["alpha_diff"].abs().sort_values(ascending=False)
difference.loc[moved.index, ["tensor", "alpha_a", "alpha_b", "alpha_diff"]].head(5).round(4)""",
    """`scan.save(directory)` writes all of it, with a report that opens in any browser; `htsr.load_scan(directory)`
reads it back.""",
]

SCAN_TO_TRAINING = [
    """# From a scan to training

A scan says how many outliers each block holds; a layer table turns that into how often each block is trained; `owlore`
draws the blocks by it. Everything runs on the small model and the rows that come with the packages.""",
    """%matplotlib inline
import htsr

scan = htsr.scan("demo", samples=8, seq_len=256, workers=1, quiet=True)
scan.blocks.round(4)""",
    """## The table

`inclusion` is the chance that a draw of gamma different blocks holds this one: proportional to the score, at most 1,
and gamma in sum.""",
    """table = scan.table(rule="lod", gamma=3)
table""",
    "scan.plot.table(table).figure",
    """Other rules and a floor change who is drawn. A floor keeps every block in play, which a table as steep as this
one needs.""",
    """import pandas as pd

tables = {
    "lod": table,
    "lod, floor 0.1": scan.table(rule="lod", gamma=3, floor=0.1),
    "lod, temperature 2": scan.table(rule="lod", gamma=3, temperature=2),
    "alpha": scan.table(rule="alpha", gamma=3),
    "uniform": scan.table(rule="uniform", gamma=3),
}
pd.DataFrame({name: made.inclusion for name, made in tables.items()}).rename_axis("block").round(3)""",
    """## Drawing is a pure function

The same seed, period and table give the same blocks, on every machine and after every resume.""",
    """from owlore import sampling

[sampling.draw(table.inclusion, 0, period) for period in range(4)]""",
    """## Training

Every `every` steps another `active` blocks are drawn; only those have gradients and optimizer state, and the gradients
are projected to `rank` dimensions. `floor` goes to the trainer: it makes the inclusions anew from the table's
probabilities, for its own number of active blocks.""",
    """import tempfile
from pathlib import Path

import owlore

folder = tempfile.TemporaryDirectory()
draws = {"active": 3, "every": 3, "floor": 0.1, "rank": 16, "seed": 0}
steps = {"steps": 24, "batch": 8, "seq_len": 192, "lr": 3e-3, "eval_data": 0.05, "eval_every": 12}
run = owlore.train("demo", "demo-data", table=table, out=Path(folder.name) / "run", **draws, **steps)
run.history[run.history["split"] == "eval"][["step", "loss"]]""",
    "run.plot.loss().figure",
    "Which blocks were trained when, and how often against what the table expects:",
    "run.plot.draws().figure",
    "run.plot.draw_counts().figure",
    "What was held, in bytes: optimizer state follows the blocks that are active, so it does not grow.",
    """train = run.history[run.history["split"] == "train"]
assert train["loss"].notna().all()
train.groupby(train["active_blocks"].map(str), sort=False)["state_bytes"].max().to_frame()""",
    """The trained model is a plain transformers model, `run.model`; the directory `model/` of the run loads with
`AutoModelForCausalLM.from_pretrained`. One run of 24 steps says that the road works, not that this table is the best
one: compare with `table="uniform"` over several seeds before you believe it.""",
    """evals = run.history.loc[run.history["split"] == "eval", "loss"]
assert evals.iloc[-1] < evals.iloc[0]
folder.cleanup()""",
]

NOTEBOOKS = {"layer-statistics": LAYER_STATISTICS, "scan-to-training": SCAN_TO_TRAINING}
CODE = ("%", "import ", "from ", "scan", "columns", "ranked", "eigenvalues", "doubt", "table", "run.", "train", "evals")


def build(cells: list[str], name: str) -> object:
    """A notebook of these cells, not executed; ids are counted so that the file does not change by itself."""
    from nbformat import v4

    made = [v4.new_code_cell(text) if text.startswith(CODE) else v4.new_markdown_cell(text) for text in cells]
    for number, cell in enumerate(made):
        cell["id"] = f"{name}-{number:02d}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def drop_stderr(notebook: object) -> None:
    """Progress bars and what libraries warn of are not kept: they name this machine's folders."""
    for cell in notebook.cells:  # type: ignore[attr-defined]
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name, cells in NOTEBOOKS.items():
        notebook = build(cells, name)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False,
                           resources={"metadata": {"path": folder}}).execute()  # fmt: skip
        drop_stderr(notebook)
        text = nbformat.writes(notebook)
        problems = [word for word in (folder, str(Path.home()), sys.prefix, str(HERE)) if word in text]
        if problems or len(text) > LARGEST:
            raise SystemExit(f"{name}: {len(text)} bytes, names of this machine in it: {problems}")
        (HERE / f"{name}.ipynb").write_text(text + "\n")
        print(f"{name}.ipynb: {len(cells)} cells, {len(text):,} bytes")


if __name__ == "__main__":
    main()
