#!/bin/sh
# run.sh MODEL_DIR DATA_DIR OUT_DIR: 200 rows, shuffled by seed 0, of each of the eight tasks; seconds are in the result
set -e
owlore eval "$1" --data-dir "$2" --tasks commonsense --limit 200 --shuffle 0 --out "$3"
