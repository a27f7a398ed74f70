"""Resident set of `owlore train --residency host` on a checkpoint that is large beside the process itself.

python reports/bench/gpu/host_memory.py [--blocks 24] [--out DIR]

A bf16 Llama of random weights is written to a temporary directory in shards, a block at a time; then each way of
training it runs in a process of its own for two steps, and its largest resident set is read when the model stands
ready, and at the end, when the result has been exported. A process that trains a one-block model tells what the
libraries need themselves. On a CPU the slots and the drawn blocks lie in the same memory and are counted with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from owlore.kernels.seeds import generator_for

HERE = Path(__file__).parent
WIDTH, HIDDEN, VOCABULARY = 1024, 2816, 4096
WAYS = {
    "device": [],
    "host": ["--residency", "host"],
    "host, nf4": ["--residency", "host", "--frozen", "nf4"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--out", type=Path, default=HERE / "host_memory.json")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small, large = (write_model(root / f"model-{n}", n) for n in (1, args.blocks))
        size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
        rows["process alone"] = train(small, root, [])
        for name, options in WAYS.items():
            rows[name] = train(large, root, options)
    args.out.write_text(json.dumps({"checkpoint_bytes": size, "blocks": args.blocks, "rows": rows}, indent=1) + "\n")
    print(table(size, rows))
    return 0


def write_model(directory: Path, blocks: int) -> Path:
    """Configuration, tokenizer and a shard of every four blocks."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from htsr.model.locate import locate

    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=blocks, num_attention_heads=8,
                         vocab_size=VOCABULARY, max_position_embeddings=256, dtype="bfloat16")  # fmt: skip
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(locate("demo")).save_pretrained(directory)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, like in shapes.items():
        part = int(name.split(".")[2]) // 4 + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{part:05d}.safetensors", {})[name] = like
    for file, held in shards.items():
        save_file({name: _made(name, like) for name, like in held.items()}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _made(name: str, like: torch.Tensor) -> torch.Tensor:
    values = torch.empty(like.shape, dtype=torch.bfloat16)
    if like.ndim == 1:
        return values.fill_(1.0)
    return values.normal_(0.0, 0.02, generator=generator_for(0, "host memory", name))


CHILD = """
import json, sys
from pathlib import Path
import owlore
import owlore.run.lifecycle as lifecycle
from owlore.config import TrainConfig

def peak():  # ru_maxrss would begin with the parent's
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

seen, build_trainer = {}, lifecycle.build_trainer
def ready(*given, **named):
    made = build_trainer(*given, **named)
    seen["loaded"] = peak()
    return made
lifecycle.build_trainer = ready
options = json.loads(sys.argv[1])
rows = [{"prompt": "In the beginning", "completion": " God created the heaven and the earth."}] * 4
done = owlore.train(options.pop("model"), rows, **options)
seen["exported"] = peak()
print(json.dumps(seen | {"residency": done.record["residency"]}))
"""


def train(model: Path, root: Path, options: list[str]) -> dict[str, Any]:
    """Largest resident sets of a process that trains this way, in bytes."""
    given: dict[str, Any] = {"model": str(model), "out": str(root / f"run-{len(list(root.iterdir()))}"), "steps": 2,
                             "every": 1, "batch": 1, "seq_len": 16, "table": "uniform", "active": 1, "rank": 16,
                             "weights": "bf16-sr", "device": "cpu"}  # fmt: skip
    given |= {options[i].removeprefix("--").replace("-", "_"): options[i + 1] for i in range(0, len(options), 2)}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(given)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(size: int, rows: dict[str, Any]) -> str:
    """MB beyond the process alone."""
    alone = rows["process alone"]
    lines = [
        f"checkpoint {size / 1e6:,.0f} MB; the process alone {alone['exported'] / 1e6:,.0f} MB",
        "",
        "| way | when loaded, MB | at the end, MB | store, MB | of the checkpoint |",
        "|" + " --- |" * 5,
    ]
    for name, row in rows.items():
        if name == "process alone":
            continue
        loaded, exported = (row[key] - alone[key] for key in ("loaded", "exported"))
        store = (row["residency"] or {"host_bytes": {"store": 0}})["host_bytes"]["store"]
        shown = f"{store / 1e6:,.0f}" if store else "-"
        lines.append(f"| {name} | {loaded / 1e6:,.0f} | {exported / 1e6:,.0f} | {shown} | {exported / size:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
