"""Does a change of the code change a bit of any result? Train and scan tiny models, hash everything, compare.

    python same_bits.py record  [--rows TEXT --why TEXT] [--stories DIR] [--minilm DIR]
    python same_bits.py compare [--rows TEXT]            [--stories DIR] [--minilm DIR]

`record` runs all rows and writes `recorded/<platform>.json`; with `--rows` it replaces only the rows whose name has
that text, and keeps the reason. `compare` runs them again and leaves with 1 when anything differs. It calls
`owlore.train` and `htsr.scan`, and knows nothing else of the packages.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "pandas", "safetensors", "bitsandbytes")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
REFUSALS = ("UsageError", "BadInput")  # any other exception is a failure of this script
REMOVED_COLUMNS = ("seconds",)  # of scan.csv and blocks.csv
REMOVED_KEYS = ("seconds", "peak_bytes", "versions", "created", "id")  # of scan.json and table.json; id is a path
COMMON: dict[str, Any] = {
    "steps": 6, "batch": 2, "seq_len": 64, "lr": 1e-3, "schedule": "linear", "warmup": 0, "save_every": 3, "keep": 9,
    "dtype": "float32", "device": "cpu", "seed": 0, "quiet": True,
}  # fmt: skip
UNIFORM = {"table": "uniform", "active": 2}
PROJECTED = {"rank": 8, "scale": 1.0}
WEIGHTS: dict[str, dict[str, Any]] = {  # what each method reads; `every` is 2 for demo and 3 for stories260K
    "owlore": UNIFORM | PROJECTED, "lisa": UNIFORM, "lisa-d": {"active": 2}, "grass": UNIFORM,
    "badam": {"table": "uniform"}, "galore": PROJECTED, "full": {},
}  # fmt: skip
PERIODIC = ("owlore", "lisa", "lisa-d", "grass", "badam")
ADAPTERS = ("lora", "dora", "smt", "dota", "qdota")
HOST = {"residency": "host"}
PLACES: dict[str, dict[str, Any]] = {  # where frozen blocks live and how, for the methods that train weights
    "host bf16": HOST | {"frozen": "bf16"}, "host int8": HOST | {"frozen": "int8"},
    "host nf4": HOST | {"frozen": "nf4"}, "device int8": {"frozen": "int8"}, "device nf4": {"frozen": "nf4"},
    "host offload": HOST | {"offload_activations": True},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # on demo, for one method of each kind
    "accum 2": {"accum": 2}, "packing": {"packing": True, "seq_len": 256}, "resumed": {}, "two processes": {},
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip
OWLORE_ONLY: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": "on"}, "state_bits 8": {"state_bits": 8},
    "on_switch host": {"on_switch": "host", "active": 6},  # enough for blocks to come back
    "bf16-sr": {"weights": "bf16-sr", "dtype": "bfloat16"}, "always on": {"always_on": "embeddings,norm,head"},
}  # fmt: skip
ROOMS = ("garden", "kitchen", "old mill", "harbour", "library", "north tower", "barn", "station")
DATA = [
    {
        "prompt": f"Question {i}: the {ROOMS[i % 8]} has {i + 2} lamps and {3 * i} chairs. How many things?",
        "completion": f" There are {4 * i + 2} things in the {ROOMS[i % 8]}" + ", all counted" * (i % 3) + ".",
    }
    for i in range(16)
]


def matrix() -> dict[str, dict[str, Any]]:
    """Every row by name: `model` and `options` of a training run, with `kind` where it is not a plain one."""
    rows: dict[str, dict[str, Any]] = {}

    def add(model: str, method: str, what: str, extra: dict[str, Any], kind: str = "train") -> None:
        every = {"every": 2 if model == "demo" else 3} if method in PERIODIC else {}
        options = COMMON | {"method": method} | WEIGHTS.get(method, {}) | every | extra
        rows[f"{model} {method} {what}"] = {"kind": kind, "model": model, "options": options}

    for model in ("demo", "stories260K"):
        for method in (*WEIGHTS, *ADAPTERS):
            add(model, method, "resident", {})
        for method in WEIGHTS:
            for what, extra in PLACES.items():
                add(model, method, what, extra)
    for method in ADAPTERS:
        add("demo", method, "host", HOST)
    for method in ("owlore", "lisa", "lora", "smt"):
        for what, extra in VARIANTS.items():
            add("demo", method, what, extra, what if what in ("resumed", "two processes") else "train")
    for what, extra in OWLORE_ONLY.items():
        add("demo", "owlore", what, extra)
    for model in ("demo", "stories260K", "MiniLM"):
        options = {"samples": 8, "seq_len": 128, "workers": 1, "nulls": model == "demo", "fresh": True}
        rows[f"{model} scan"] = {"kind": "scan", "model": model, "options": options}
    return rows


def sha(*parts: bytes | str) -> str:
    """The start of the SHA-256 of the parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:32]


def tensors_sha(files: list[Path]) -> str:
    """Over name, dtype, shape and bytes of all tensors of safetensors files, sorted by name."""
    import torch
    from safetensors.torch import load_file

    found = sorted((name, tensor) for file in files for name, tensor in load_file(file).items())
    parts: list[bytes | str] = []
    for name, tensor in found:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), raw]
    return sha(*parts) if found else "no tensors"


def training_hashes(run: Path) -> dict[str, Any]:
    """What a finished run left: the export, the columns of the metrics, every kept checkpoint."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"export": tensors_sha(sorted((run / "model").glob("*.safetensors")))}
    for column in ("loss", "grad_norm"):
        found[column] = sha(*(repr(row[column]) for row in metrics))
    found["last_loss"] = metrics[-1]["loss"]
    for file in sorted(run.glob("checkpoints/*/*.safetensors")):
        found[f"{file.parent.name}/{file.stem}"] = tensors_sha([file])
    return found


def without(value: Any) -> Any:
    """The same JSON value without REMOVED_KEYS, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if key not in REMOVED_KEYS}
    return [without(inner) for inner in value] if isinstance(value, list) else value


def scan_hashes(directory: Path) -> dict[str, Any]:
    """Every column of the two tables of a scan, every key of its two JSON files."""
    found: dict[str, Any] = {}
    for name in ("scan.csv", "blocks.csv"):
        head, *lines = list(csv.reader((directory / name).read_text(encoding="utf-8").splitlines()))
        columns = {column: [line[i] for line in lines] for i, column in enumerate(head)}
        found |= {f"{name}:{key}": sha(*column) for key, column in columns.items() if key not in REMOVED_COLUMNS}
    for name in ("table.json", "scan.json"):
        content = without(json.loads((directory / name).read_text(encoding="utf-8")))
        found |= {f"{name}:{key}": sha(json.dumps(value, sort_keys=True)) for key, value in content.items()}
    return found


def run_row(row: dict[str, Any], source: str, directory: Path) -> dict[str, Any]:
    """Run one row in an empty directory and hash what it wrote; a refusal is the name of its exception."""
    import htsr
    import owlore

    out = directory / "run"
    if row["kind"] == "scan":
        htsr.scan(source, out=out, plots=False, quiet=True, **row["options"])
        return scan_hashes(out)
    if row["kind"] == "two processes":
        (directory / "row.json").write_text(json.dumps({"model": source, "out": str(out), "options": row["options"]}))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*launch, __file__, "child", str(directory / "row.json")], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"two processes failed:\n{done.stderr[-3000:]}")
        return training_hashes(out)
    try:
        owlore.train(source, DATA, out=str(out), **row["options"])
    except Exception as error:
        if type(error).__name__ not in REFUSALS:
            raise
        return {"refused": type(error).__name__}
    whole = training_hashes(out)
    if row["kind"] != "resumed":
        return whole
    again = directory / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-000006")
    owlore.train(source, DATA, out=str(again), resume=True, **row["options"])
    resumed = training_hashes(again)
    if resumed != whole:
        print("  note: the resumed run is not the uninterrupted one:", ", ".join(differences(whole, resumed)))
    return {
        f"{of}:{key}": value for of, part in (("whole", whole), ("resumed", resumed)) for key, value in part.items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both."""
    return [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]


def find_models(arguments: argparse.Namespace, temporary: Path) -> dict[str, str | None]:
    """Where each model is; None for one that cannot be had, with the reason printed."""
    found: dict[str, str | None] = {"demo": "demo"}
    minilm = arguments.minilm or temporary / "all-MiniLM-L6-v2"
    if arguments.minilm is None and arguments.rows in "MiniLM scan":
        fetch = [sys.executable, str(ROOT / "reports" / "scans" / "fetch_minilm.py"), str(minilm)]
        subprocess.run(fetch, capture_output=True, check=False)
    stories = arguments.stories or ROOT.parent / "shared" / "models" / "stories260K"
    for name, directory in (("stories260K", stories), ("MiniLM", minilm)):
        found[name] = str(directory) if (directory / "model.safetensors").is_file() else None
        if found[name] is None:
            print(f"{name}: skipped, its weights are not there; --stories and --minilm name the directories")
    return found


def describe() -> tuple[str, dict[str, Any]]:
    """The platform's key and what else could change a bit."""
    import torch

    release = ".".join(version("torch").split(".")[:2])
    key = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-torch{release}"
    versions = {name: version(name) for name in PACKAGES}
    return key, {"key": key, "python": platform.python_version(), "threads": torch.get_num_threads(), **versions}


def main() -> int:
    """Record or compare. Returns: 0, or 1 when a row differs or has no record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("--rows", default="", help="only rows whose name has this text")
    parser.add_argument("--why", help="why these rows are recorded anew")
    parser.add_argument("--stories", type=Path, help="directory of stories260K")
    parser.add_argument("--minilm", type=Path, help="directory of all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    if arguments.command == "record" and bool(arguments.rows) != bool(arguments.why):
        parser.error("record takes --rows and --why together")
    chosen = {name: row for name, row in matrix().items() if arguments.rows in name}
    key, info = describe()
    file, different, began = HERE / "recorded" / f"{key}.json", 0, time.time()
    skipped = 0
    partial = arguments.command == "compare" or arguments.rows
    if partial and not file.is_file():
        parser.error(f"nothing is recorded for {key}: run `record` on the code before the change")
    record = json.loads(file.read_text()) if partial else {"platform": info, "rows": {}}
    if record["platform"] != info:
        print("note: not recorded with these versions:", ", ".join(differences(record["platform"], info)))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {name: str(Path(temporary) / name) for name in ("OWLORE_CACHE", "HTSR_CACHE")}
        models = find_models(arguments, Path(temporary))
        for number, (name, row) in enumerate(chosen.items()):
            source, directory = models[row["model"]], Path(temporary) / str(number)
            if source is None:
                print(f"skipped    {name}")
                skipped += 1
                continue
            directory.mkdir()
            new, old = run_row(row, source, directory), record["rows"].get(name)
            shutil.rmtree(directory)
            if arguments.command == "record":
                record["rows"][name] = new | ({"why": arguments.why} if arguments.why else {})
                print(f"recorded   {name}  {new.get('refused', '')}", flush=True)
                continue
            names = ["not recorded"] if old is None else [one for one in differences(old, new) if one != "why"]
            different += bool(names)
            print(f"{'DIFFERENT' if names else 'same     '}  {name}  {', '.join(names)}", flush=True)
    if arguments.command == "record":
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")
    ran = len(chosen) - skipped
    print(f"{ran} rows run, {different} different, {skipped} skipped, {time.time() - began:.0f} s")
    return int(different > 0 or not ran)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["child"]:
        import owlore

        task = json.loads(Path(sys.argv[2]).read_text())  # one of two processes
        owlore.train(task["model"], DATA, out=task["out"], **task["options"])
    else:
        sys.exit(main())
