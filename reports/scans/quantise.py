"""How much does 4-bit quantisation move a scan? all-MiniLM-L6-v2 in fp32 and through Q4_1, side by side.

    python reports/scans/quantise.py models/all-MiniLM-L6-v2     (needs the extra `gguf`; writes quantisation.json)

SmolLM2-135M is only at hand after Q4_1. MiniLM is at hand unquantised, so its linear maps inside the blocks go through
the same format here (as SmolLM2's did; its embeddings were kept in 8 bits), and everything is scanned again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parent


def quantised_copy(model: Path, directory: Path) -> None:
    """The model with every 2-D weight inside a block rounded to Q4_1 and back."""
    import torch
    from gguf import GGMLQuantizationType, quants
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and ".layer." in name:
            packed = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_1)
            tensors[name] = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_1).copy())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in model.glob("*"):
        if file.suffix in (".json", ".txt"):
            shutil.copyfile(file, directory / file.name)


def compare(before: Any, after: Any) -> dict[str, Any]:
    """What moved, over the matrices inside the blocks."""
    import htsr

    pairs = htsr.compare(before, after)
    pairs = pairs[pairs["block"].notna() & pairs["alpha_a"].notna()]
    moved = pairs["alpha_diff"].abs()
    top = before.frame.set_index("tensor")["lambda_max"], after.frame.set_index("tensor")["lambda_max"]
    stretched = (top[1] / top[0] - 1).abs().reindex(pairs["tensor"])
    blocks = before.blocks, after.blocks
    return {
        "model": before.provenance["model"]["id"],
        "matrices": len(pairs),
        "alpha_moved_median": float(moved.median()),
        "alpha_moved_most": float(moved.max()),
        "alpha_signed_mean": float(pairs["alpha_diff"].mean()),
        "lambda_max_moved_median": float(stretched.median()),
        "lambda_max_moved_most": float(stretched.max()),
        "spearman_matrices_alpha": rank(pairs["alpha_a"], pairs["alpha_b"]),
        "spearman_blocks_alpha": rank(blocks[0]["alpha"], blocks[1]["alpha"]),
        "spearman_blocks_lod": rank(blocks[0]["lod"], blocks[1]["lod"]),
        "lod_moved_most": float((blocks[1]["lod"] / blocks[0]["lod"] - 1).abs().max()),
        "lod_with_alpha_before": rank(blocks[0]["lod"], blocks[0]["alpha"]),
        "lod_with_alpha_after": rank(blocks[1]["lod"], blocks[1]["alpha"]),
    }


def rank(a: pd.Series, b: pd.Series) -> float:
    """Spearman's correlation."""
    return float(np.corrcoef(a.rank(), b.rank())[0, 1])


def main(model: Path) -> None:
    import htsr

    before = htsr.scan(model, quiet=True)
    with tempfile.TemporaryDirectory() as temporary:
        quantised_copy(model, Path(temporary))
        after = htsr.scan(temporary, quiet=True)
    result = compare(before, after)
    (HERE / "quantisation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
