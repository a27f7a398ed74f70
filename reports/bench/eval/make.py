"""The table of this page from the results that `run.sh` left.

python reports/bench/eval/make.py OUT_DIR   # every results.json below it; writes results.json and README.md here
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- table -->", "<!-- end -->"


def main() -> None:
    found = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).rglob("results.json"))]
    tasks: dict[str, Any] = {}
    for result in found:
        tasks |= {name: {k: v for k, v in one.items() if k != "rows"} for name, one in result["tasks"].items()}
    kept = {key: found[0][key] for key in ("schema", "model_sha256", "protocol", "limit", "shuffle", "scoring", "dtype",
                                           "versions")}  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(kept | {"tasks": tasks}, indent=1, sort_keys=True) + "\n")
    page = (HERE / "README.md").read_text()
    before, _, rest = page.partition(START)
    (HERE / "README.md").write_text(f"{before}{START}\n\n{table(tasks)}\n\n{END}{rest.partition(END)[2]}")


def table(tasks: dict[str, Any]) -> str:
    lines = [
        "| task | acc | standard error | acc_norm | rows | seconds | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in sorted(tasks.items()):
        normalised = f"{one['acc_norm']:.3f}" if "acc_norm" in one else ""
        lines.append(f"| {name} | {one['acc']:.3f} | {one['acc_stderr']:.3f} | {normalised} | {one['n']} "
                     f"| {one['seconds']:.0f} | {one['cpu_seconds']:.0f} |")  # fmt: skip
    rows, wall, processor = (sum(one[key] for one in tasks.values()) for key in ("n", "seconds", "cpu_seconds"))
    return "\n".join([*lines, f"| together | | | | {rows} | {wall:.0f} | {processor:.0f} |"])


if __name__ == "__main__":
    main()
