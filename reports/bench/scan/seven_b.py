"""A checkpoint of Llama-2-7B's shapes, random, written block by block, scanned, and deleted again.

    python reports/bench/scan/seven_b.py --work DIR [--out FILE.json]               (14 GB of disk)
    python reports/bench/scan/seven_b.py --work DIR --blocks 4                      (a part of it, the rest projected)
    python reports/bench/scan/seven_b.py --work DIR --device cuda --lod-blocks 32   (LOD in full on a GPU)

Every measurement is a process of its own. `lod` runs the default calibration (32 windows of 512 tokens) through the
first blocks; what the second took stands for each of the others. `spectra` is `htsr scan` of all blocks that were
written, without calibration and with nothing from the cache. With fewer than 32 blocks, wanted or because the disk has
no room, spectra are projected as well, and the output says so.
The weights have input features of uneven size, so that some are outliers; their spectra mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS, WIDTH, HIDDEN, HEADS, VOCAB = 32, 4096, 11008, 32, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN),
}  # fmt: skip
BLOCK_BYTES = 2 * sum(rows * cols for rows, cols in SHAPES.values())
OUTER_BYTES, SPARE_BYTES, GIB = 2 * 2 * VOCAB * WIDTH, 8 * 10**9, 2**30


def matrix(rows: int, cols: int, seed: int) -> Any:
    """Gaussian rows whose columns have log-normal sizes, bfloat16."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    sizes = torch.exp(0.8 * torch.randn(cols, generator=rng)) * 0.02
    return (torch.randn(rows, cols, generator=rng) * sizes).to(torch.bfloat16)


def generate(folder: Path, blocks: int) -> None:
    """A sharded checkpoint of `blocks` blocks with the demo's tokenizer; memory is that of one block."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    demo = Path(__file__).parents[3] / "htsr" / "assets" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {
            f"{prefix}{name}.weight": matrix(*shape, 100 * index + i) for i, (name, shape) in enumerate(SHAPES.items())
        }
        tensors |= {f"{prefix}{n}_layernorm.weight": torch.ones(WIDTH).bfloat16() for n in ("input", "post_attention")}
        save_file(tensors, folder / f"block-{index:02}.safetensors")
    outer = {"model.embed_tokens.weight": matrix(VOCAB, WIDTH, 1), "lm_head.weight": matrix(VOCAB, WIDTH, 2)}
    save_file(outer | {"model.norm.weight": torch.ones(WIDTH).bfloat16()}, folder / "outer.safetensors")
    describe(folder, blocks)


def describe(folder: Path, blocks: int) -> None:
    """The configuration and the index of the shards that lie in `folder`."""
    from safetensors import safe_open

    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file.name)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def first_blocks(folder: Path, target: Path, blocks: int) -> Path:
    """A model of the first blocks alone, its files the same ones (hard links)."""
    target.mkdir()
    names = ["outer.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, *(f"block-{index:02}.safetensors" for index in range(blocks))]:
        os.link(folder / name, target / name)
    describe(target, blocks)
    return target


def lod(folder: str, device: str) -> None:
    """(In a process of its own.) The calibration alone: [wall, CPU] seconds by block, memory, the table's numbers."""
    from htsr.model.calibration import calibrate
    from htsr.model.open import open_source
    from htsr.provenance import peak_bytes

    cuda = device.startswith("cuda")
    import torch

    clocks = np.array([time.perf_counter(), time.process_time()])
    ticks: list[np.ndarray] = []

    def tick(*_: int) -> None:
        ticks.append(np.array([time.perf_counter(), time.process_time()]) - clocks)

    found = calibrate(open_source(folder), device=device, progress=tick)
    each = np.diff(ticks, axis=0)
    record = {
        "seconds": ticks[-1].tolist(),
        "seconds_by_block": each.tolist(),
        "seconds_before": (ticks[0] - each[0]).tolist(),
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "device_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "lod": [block.lod for block in found.blocks.values()],
        **found.record(),
    }
    print(json.dumps(record))


def child(command: list[str], cache: Path) -> tuple[dict[str, Any], float, float]:
    """The JSON object that a process printed, its wall seconds and its CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "HTSR_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), wall, used


def measure_lod(folder: Path, scratch: Path, blocks: int, device: str) -> dict[str, Any]:
    small = first_blocks(folder, scratch / f"first-{blocks}", blocks)
    found, _, _ = child([sys.executable, __file__, "--child", str(small), "--device", device], scratch / "cache")
    each = np.mean(found["seconds_by_block"], axis=0)
    return {
        **found,
        "blocks": blocks,
        "block_seconds": each.tolist(),
        "projected_seconds": (found["seconds_before"] + BLOCKS * each).tolist(),
    }


def measure_spectra(folder: Path, scratch: Path, blocks: int, device: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from htsr.cli import main; main()", "scan", str(folder), "--calibration", "none"]
    command += ["--out", str(scratch / "scan"), "--fresh", "--no-plots", "--json", "--quiet", "--device", device]
    found, wall, used = child(command, scratch / "cache")
    kept = {name: found[name] for name in ("tensors", "seconds", "peak_bytes")}
    routes = {name: found["spectra"][name] for name in ("routes", "gflop")}
    return {
        **kept,
        **routes,
        "escalated": len(found["spectra"]["escalated"]),
        "blocks": blocks,
        "wall": wall,
        "cpu": used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a directory on a disk with 22 GB free")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default="lod,spectra")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="how many to write at most")
    parser.add_argument("--lod-blocks", type=int, default=2, help="at least 2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        lod(options.child, options.device)
        return
    parts = options.parts.split(",")
    room = int((shutil.disk_usage(options.work).free - SPARE_BYTES - OUTER_BYTES) // BLOCK_BYTES)
    blocks = min(options.blocks if "spectra" in parts else options.lod_blocks, room)
    if blocks < options.lod_blocks:
        raise SystemExit(f"{options.work} has room for {room} blocks of {BLOCK_BYTES / 1e9:.1f} GB, expected more")
    scratch, result = (
        options.work / f"seven-b-{os.getpid()}",
        {"blocks": blocks, "threads": os.environ.get("OMP_NUM_THREADS")},
    )
    try:
        started = time.perf_counter()
        generate(scratch / "model", blocks)
        size = sum(file.stat().st_size for file in (scratch / "model").iterdir())
        print(f"{blocks} of {BLOCKS} blocks, {size / 1e9:.1f} GB written in {time.perf_counter() - started:.0f} s")
        if "lod" in parts:
            result["lod"] = found = measure_lod(scratch / "model", scratch, options.lod_blocks, options.device)
            (wall, cpu), (block, block_cpu), (all_, all_cpu) = (
                found[name] for name in ("seconds", "block_seconds", "projected_seconds")
            )
            print(f"LOD of {found['blocks']} blocks ({found['precision']['dtype']}): {wall:.0f} s, {cpu:.0f} CPU s; a "
                  f"block {block:.0f} s, {block_cpu:.0f} CPU s; {BLOCKS} blocks would take {all_:.0f} s, "
                  f"{all_cpu:.0f} CPU s; peak {found['peak_bytes'] / GIB:.2f} GiB of the process"
                  + (f", {found['device_peak_bytes'] / GIB:.2f} of the device (reserved "
                     f"{found['device_reserved_bytes'] / GIB:.2f})" if found["device_peak_bytes"] else ""))  # fmt: skip
        if "spectra" in parts:
            result["spectra"] = found = measure_spectra(scratch / "model", scratch, blocks, options.device)
            print(f"spectra of {found['tensors']['ok']} matrices: {found['wall']:.0f} s, {found['cpu']:.0f} CPU s, "
                  f"peak {found['peak_bytes'] / GIB:.2f} GiB; routes {found['routes']}"
                  + f"; {found['cpu'] * BLOCKS / blocks:.0f} CPU s for all" * (blocks < BLOCKS))  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
