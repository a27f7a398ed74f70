#!/bin/sh
# run.sh MODEL_DIR DATA_DIR OUT_DIR: 200 rows, shuffled by seed 0, of each of the eight tasks, both timed
set -e
python -c 'import torch; print(torch.get_num_threads(), "threads")' >&2
start=$(date +%s)
owlore eval "$1" --data-dir "$2" --tasks commonsense --limit 200 --shuffle 0 --fresh --out "$3" --json > "$3.json"
echo "$(($(date +%s) - start)) s for the whole command" | tee "$3.seconds"
