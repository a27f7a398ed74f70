"""Does a change of the code change a bit of any result? Train and scan tiny models, hash everything, compare.

    python same_bits.py record  [--rows TEXT --why TEXT] [--without TEXT] [--stories DIR] [--minilm DIR]
    python same_bits.py compare [--rows TEXT]            [--without TEXT] [--stories DIR] [--minilm DIR]

`record` runs all rows and writes `recorded/<platform>.json`; with `--rows` it replaces only the rows whose name has
that text, and keeps the reason. `compare` runs them again and leaves with 1 when anything differs, and when a recorded
row was not run though nothing left it out. It calls `owlore.train` and `htsr.scan`, and knows nothing else of the
packages. Every row spells out all settings, so that another default changes no row; `record` makes sure of that.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "pandas", "safetensors", "bitsandbytes")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
NOTES = ("why", "commit")  # of a row that was recorded anew
REFUSALS = ("UsageError", "BadInput")  # any other exception is a failure of this script
# Of scan.csv and blocks.csv. The last three are of a table with the settings that are the default.
REMOVED_COLUMNS = ("seconds", "score", "probability", "inclusion")
REMOVED_KEYS = ("seconds", "peak_bytes", "versions", "created", "id")  # of scan.json and table.json; id is a path
UNITS = ("avx512_bf16", "avx512_fp16", "amx_bf16")  # of a processor: matrix products choose their kernels by these

# All settings of a training run: those of every method, then those that each method reads beyond them.
EVERY: dict[str, Any] = {
    "steps": 6, "epochs": None, "batch": 2, "accum": 1, "seq_len": 64, "group_by_length": False, "packing": False,
    "lr": 1e-3, "schedule": "linear", "warmup": 0, "weight_decay": 0.0, "clip": 1.0, "preset": None,
    "residency": "device", "resident_share": 0.0, "frozen": "bf16", "offload_activations": False,
    "weights": "fp32", "state_bits": 32, "checkpointing": "off",
    "eval_data": None, "eval_every": None, "save_every": 3, "keep": 9, "keep_best": False, "resume": False,
    "seed": 0, "device": "cpu", "dtype": "float32", "attn": "sdpa", "compile": False,
    "log_to": [], "json": False, "quiet": True,
}  # fmt: skip
SAMPLED: dict[str, Any] = {"table": "uniform", "active": 2, "draw": "exact", "floor": 0.0, "on_switch": "drop"}
PROJECTED: dict[str, Any] = {
    "rank": 8, "refresh": "per-activation", "project_side": "smaller", "scale": 1.0, "project_always_on": False,
    "set": {"residual": "none", "scaling": "none", "limit": 1.01, "moments": "rotate"},
}  # fmt: skip
BLOCKS_ALONE: dict[str, Any] = {"always_on": [], "set": {}}
ALL_ELSE: dict[str, Any] = {"always_on": ["embeddings", "norm", "head"], "set": {}}
WEIGHTS: dict[str, dict[str, Any]] = {  # methods that train the model's own weights
    "owlore": SAMPLED | BLOCKS_ALONE | PROJECTED,
    "lisa": SAMPLED | ALL_ELSE,
    "lisa-d": SAMPLED | ALL_ELSE | {"table": "decrease"},
    "grass": SAMPLED | BLOCKS_ALONE | {"set": {"temperature": 1.0, "smoothing": 0.5, "forget": 0.1}},
    "badam": SAMPLED | BLOCKS_ALONE | {"active": 1, "draw": "shuffled"},
    "galore": ALL_ELSE | PROJECTED | {"refresh": 200},
    "full": ALL_ELSE,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear", "init": "default"}
DOTA: dict[str, Any] = {"num_cores": 3, "density": None, "init": "mpo", "target_modules": "all-linear"}
SMT: dict[str, Any] = {
    "density": 0.0084, "block_size": 256, "selection": "gradient", "criterion": "mean_of_abs", "allotment": "global",
    "warmup_batches": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "beta2": 0.999,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"set": LORA}, "dora": {"set": LORA}, "smt": {"set": SMT},
    "dota": {"set": DOTA | {"residual": "implicit"}}, "qdota": {"set": DOTA | {"alternations": 0}},
}  # fmt: skip
# What goes by the model's size: steps of a period, the quarter of uniform inclusion that grass keeps, the cores' bond.
BY_MODEL: dict[str, dict[str, Any]] = {
    "demo": {"every": 2, "floor": 0.0625, "bond": 9}, "stories260K": {"every": 3, "floor": 0.1, "bond": 5},
}  # fmt: skip
HOST = {"residency": "host"}
PLACES: dict[str, dict[str, Any]] = {  # where frozen blocks and activations live and how; adapters refuse all of them
    "host bf16": HOST | {"frozen": "bf16"}, "host int8": HOST | {"frozen": "int8"},
    "host nf4": HOST | {"frozen": "nf4"}, "device int8": {"frozen": "int8"}, "device nf4": {"frozen": "nf4"},
    "host offload": HOST | {"offload_activations": True}, "device offload": {"offload_activations": True},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # on demo, for one method of each kind
    "accum 2": {"accum": 2}, "packing": {"packing": True, "seq_len": 256}, "resumed": {}, "two processes": {},
    "bfloat16": {"dtype": "bfloat16", "weights": "auto"},  # auto alone has fp32 masters of 16-bit weights
}  # fmt: skip
OWLORE_ONLY: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": "on"}, "state_bits 8": {"state_bits": 8},
    "on_switch host": {"on_switch": "host", "active": 6},  # enough for blocks to come back
    "bf16-sr": {"weights": "bf16-sr", "dtype": "bfloat16"}, "always on": {"always_on": ["embeddings", "norm", "head"]},
}  # fmt: skip
SCAN: dict[str, Any] = {
    "device": "cpu", "precision": "auto", "engine": "native", "calibration": "builtin", "tau": 13.0,
    "lod_scope": "block", "samples": 8, "seq_len": 128, "seed": 0, "workers": 1, "nulls": False, "fresh": True,
    "allow_pickle": False, "revision": None, "base": None, "plots": False, "quiet": True, "tokenizer": None,
}  # fmt: skip
TABLE: dict[str, Any] = {"rule": "lod", "gamma": 5, "temperature": 1.0, "floor": 0.0, "direction": "heavy"}
ROOMS = ("garden", "kitchen", "old mill", "harbour", "library", "north tower", "barn", "station")
DATA = [
    {
        "prompt": f"Question {i}: the {ROOMS[i % 8]} has {i + 2} lamps and {3 * i} chairs. How many things?",
        "completion": f" There are {4 * i + 2} things in the {ROOMS[i % 8]}" + ", all counted" * (i % 3) + ".",
    }
    for i in range(16)
]


def matrix() -> dict[str, dict[str, Any]]:
    """Every row by name: `name`, `kind`, `model` and `options`, the settings of its run."""
    rows: dict[str, dict[str, Any]] = {}

    def add(model: str, method: str, what: str, extra: dict[str, Any], kind: str = "train") -> None:
        sized, own = BY_MODEL[model], (WEIGHTS | ADAPTERS)[method]
        if "table" in own:
            own = own | {"every": sized["every"]}
        if method == "grass":
            own = own | {"floor": sized["floor"]}
        if method in ("dota", "qdota"):
            own = {"set": own["set"] | {"bond": sized["bond"]}}
        name, options = f"{model} {method} {what}", EVERY | {"method": method} | own | extra
        rows[name] = {"name": name, "kind": kind, "model": model, "options": options}

    for model in ("demo", "stories260K"):
        for method in (*WEIGHTS, *ADAPTERS):
            add(model, method, "resident", {})
        for method in WEIGHTS:
            for what, extra in PLACES.items():
                add(model, method, what, extra)
    for method in ADAPTERS:
        for what, extra in PLACES.items():
            add("demo", method, what, extra, "refused")
    for method in ("owlore", "lisa", "lora", "smt"):
        for what, extra in VARIANTS.items():
            add("demo", method, what, extra, what if what in ("resumed", "two processes") else "train")
    for what, extra in OWLORE_ONLY.items():
        add("demo", "owlore", what, extra)
    for model in ("demo", "stories260K", "MiniLM"):
        name, options = f"{model} scan", SCAN | {"nulls": model == "demo"}
        rows[name] = {"name": name, "kind": "scan", "model": model, "options": options}
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


def not_spelled_out(row: dict[str, Any], source: str, run: Path) -> list[str]:
    """Settings of a finished run, as its run.json has them, that are not what the row says or that it does not say.

    What a method does not read cannot be said: it is refused, which is tried.
    """
    import owlore

    options, wrong, unread = row["options"], [], run.with_name("unread")
    for name, value in json.loads((run / "run.json").read_text())["config"].items():
        if name in options:
            wrong += [] if options[name] == value else [f"{name} is {value!r}, not {options[name]!r}"]
        elif name not in ("model", "data", "out"):
            try:
                owlore.train(source, DATA, out=str(unread), **options, **{name: value})
            except Exception as error:
                if type(error).__name__ != "UsageError":
                    raise
            else:
                wrong.append(f"{name} is left to its default")
                shutil.rmtree(unread)
    return wrong


def parameters_left_out(call: Any, given: dict[str, Any]) -> list[str]:
    """Parameters of a call, but for the model and where to write, that are not given."""
    left = sorted(set(inspect.signature(call).parameters) - {"self", "model", "out"} - set(given))
    return [f"{name} is left to its default" for name in left]


def run_row(row: dict[str, Any], source: str, directory: Path, *, check: bool) -> dict[str, Any]:
    """Run one row in its directory and hash what it wrote; a refusal is its exception's name and exit code.

    check: leave when the row does not spell out all settings, is refused where it should not be or the other way round.
    """
    import htsr
    import owlore

    out, options = directory / "run", row["options"]
    if row["kind"] == "scan":
        result = htsr.scan(source, out=out, **options)
        result.table(**TABLE).save(out / "table.json")
        if check:
            fail_if(row, [*parameters_left_out(htsr.scan, options), *parameters_left_out(type(result).table, TABLE)])
        return scan_hashes(out)
    if row["kind"] != "two processes":  # those have been run
        try:
            owlore.train(source, DATA, out=str(out), **options)
        except Exception as error:
            if type(error).__name__ not in REFUSALS or (check and row["kind"] != "refused"):
                raise
            return {"refused": type(error).__name__, "exit_code": getattr(error, "exit_code", None)}
    if check:
        fail_if(row, ["it is not refused"] if row["kind"] == "refused" else not_spelled_out(row, source, out))
    whole = training_hashes(out)
    if row["kind"] != "resumed":
        return whole
    again = directory / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-000006")
    owlore.train(source, DATA, out=str(again), **options | {"resume": True})
    resumed = training_hashes(again)
    if resumed != whole:
        print("  note: the resumed run is not the uninterrupted one:", ", ".join(differences(whole, resumed)))
    return {
        f"{of}:{key}": value for of, part in (("whole", whole), ("resumed", resumed)) for key, value in part.items()
    }


def run_in_two_processes(tasks: list[dict[str, Any]], temporary: Path) -> None:
    """Train all tasks, one after the other, in the same two processes: starting them takes longer than the training."""
    (temporary / "tasks.json").write_text(json.dumps(tasks))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, __file__, "child", str(temporary / "tasks.json")], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"two processes failed:\n{done.stderr[-3000:]}")


def fail_if(row: dict[str, Any], wrong: list[str]) -> None:
    """Leave when something is wrong with a row, and say what."""
    if wrong:
        raise SystemExit(f"{row['name']}: {'; '.join(wrong)}; nothing is recorded")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both."""
    return [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]


def find_models(arguments: argparse.Namespace, wanted: set[str], temporary: Path) -> dict[str, str | None]:
    """Where each of the wanted models is; None for one that cannot be had, with the reason printed."""
    stories = arguments.stories or ROOT.parent / "shared" / "models" / "stories260K"
    minilm = arguments.minilm or temporary / "all-MiniLM-L6-v2"
    if arguments.minilm is None and "MiniLM" in wanted:
        fetch = [sys.executable, str(ROOT / "reports" / "scans" / "fetch_minilm.py"), str(minilm)]
        subprocess.run(fetch, capture_output=True, check=False)
    found: dict[str, str | None] = {"demo": "demo"}
    for name, directory in (("stories260K", stories), ("MiniLM", minilm)):
        found[name] = str(directory) if (directory / "model.safetensors").is_file() else None
        if found[name] is None and name in wanted:
            print(f"{name}: its weights are not there; name their directory, or leave its rows out: --without {name}")
    return found


def describe() -> tuple[str, dict[str, Any]]:
    """The platform's key and what else could change a bit."""
    import torch

    release = ".".join(version("torch").split(".")[:2])
    key = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-torch{release}"
    described = {"key": key, "processor": processor(), "python": platform.python_version()}
    return key, described | {"threads": torch.get_num_threads()} | {name: version(name) for name in PACKAGES}


def processor() -> str:
    """Who made the processor, and which UNITS it has."""
    info = Path("/proc/cpuinfo")
    words = info.read_text(errors="replace").split() if info.exists() else []
    maker = words[words.index("vendor_id") + 2] if "vendor_id" in words else platform.processor()
    return " ".join([maker, *(unit for unit in UNITS if unit in words)])


def code_version() -> str:
    """The commit of the code that runs, with -dirty where files of it are changed."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def draw_nothing() -> None:
    """Plots are two fifths of the processor time of so short a run and change no number: none is written."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda *_, **__: None


def outcomes(
    rows: dict[str, dict[str, Any]], models: dict[str, str | None], temporary: Path, *, check: bool
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, hashes and seconds of each row whose model is there."""
    draw_nothing()
    os.environ |= {name: str(temporary / name) for name in ("OWLORE_CACHE", "HTSR_CACHE")}
    places = {name: temporary / str(number) for number, name in enumerate(rows)}
    for place in places.values():
        place.mkdir()
    tasks = [
        {"model": models[row["model"]], "out": str(places[name] / "run"), "options": row["options"]}
        for name, row in rows.items()
        if row["kind"] == "two processes"
    ]
    if tasks:
        began = time.time()
        run_in_two_processes(tasks, temporary)
        print(f"{len(tasks)} runs in two processes took {time.time() - began:.1f} s", flush=True)
    for name, row in rows.items():
        source, began = models[row["model"]], time.time()
        if source is not None:
            hashes = run_row(row, source, places[name], check=check)
            shutil.rmtree(places[name])
            yield name, hashes, f"{time.time() - began:.1f} s"


def record_rows(found: Iterator[tuple[str, dict[str, Any], str]], record: dict[str, Any], why: str | None) -> None:
    """Put the rows into the record."""
    notes = {"why": why, "commit": code_version()} if why else {}
    for name, new, seconds in found:
        record["rows"][name] = new | notes
        print(f"recorded   {name}  {seconds}  {new.get('refused', '')}", flush=True)


def compare_rows(found: Iterator[tuple[str, dict[str, Any], str]], record: dict[str, Any]) -> int:
    """Say of every row what differs from the record. Returns: how many rows differ."""
    different = 0
    for name, new, seconds in found:
        old = record["rows"].get(name)
        names = ["not recorded"] if old is None else [one for one in differences(old, new) if one not in NOTES]
        different += bool(names)
        print(f"{'DIFFERENT' if names else 'same     '}  {name}  {seconds}  {', '.join(names)}", flush=True)
    return different


def main() -> int:
    """Record or compare. Returns: 0, or 1 when a row differs, has no record, or has one and was not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("--rows", default="", help="only rows whose name has this text")
    parser.add_argument("--without", action="append", default=[], help="leave out rows whose name has this text")
    parser.add_argument("--why", help="why these rows are recorded anew")
    parser.add_argument("--stories", type=Path, help="directory of stories260K")
    parser.add_argument("--minilm", type=Path, help="directory of all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    recording, began = arguments.command == "record", time.time()
    if recording and bool(arguments.rows) != bool(arguments.why):
        parser.error("record takes --rows and --why together")

    def chosen(names: Iterable[str]) -> list[str]:
        return [name for name in names if arguments.rows in name and not any(t in name for t in arguments.without)]

    every = matrix()
    rows = {name: every[name] for name in chosen(every)}
    key, info = describe()
    file, anew = HERE / "recorded" / f"{key}.json", recording and not arguments.rows
    if not anew and not file.is_file():
        parser.error(f"nothing is recorded for {key}: run `record` on the code before the change")
    record = {"commit": code_version(), "platform": info, "rows": {}} if anew else json.loads(file.read_text())
    print(f"{len(rows)} rows of {code_version()}" + ("" if anew else f", recorded at {record['commit']}"))
    if record["platform"] != info:
        print("note: not as recorded:", ", ".join(differences(record["platform"], info)))
    gone = [name for name in chosen(record["rows"]) if name not in every]
    for name in gone:
        print(f"GONE       {name}  it is recorded, and no row any more", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        models = find_models(arguments, {row["model"] for row in rows.values()}, Path(temporary))
        left = [name for name, row in rows.items() if models[row["model"]] is None]
        for name in left:
            print(f"NOT RUN    {name}", flush=True)
        if recording and left:
            return 1
        found = outcomes(rows, models, Path(temporary), check=recording)
        if recording:
            different = 0
            record_rows(found, record, arguments.why)
            record["rows"] = {name: row for name, row in record["rows"].items() if name not in gone}
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(record, indent=1) + "\n")
        else:
            different = compare_rows(found, record)
    ran, seconds = len(rows) - len(left), time.time() - began
    print(f"{ran} rows run, {different} different, {len(left)} not run, {len(gone)} gone, {seconds:.0f} s in all")
    return int(bool(different or left or (gone and not recording) or not (ran or gone)))


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["child"]:
        import owlore

        draw_nothing()
        for task in json.loads(Path(sys.argv[2]).read_text()):  # one of two processes
            owlore.train(task["model"], DATA, out=task["out"], **task["options"])
    else:
        sys.exit(main())
