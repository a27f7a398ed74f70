#!/usr/bin/env bash
# Scan SmolLM2-135M-Instruct, make its LOD table, fine-tune with it, be killed in the middle, go on.
#   run.sh MODEL_DIR DATA_DIR WORK_DIR      (MODEL_DIR from fetch_smollm2.py; DATA_DIR holds text/ and commonsense/)
set -euo pipefail
model=$1 data=$2 work=$3
scan=$work/scan run=$work/run

htsr scan "$model" --calibration "$data/text/c4_demo.jsonl" --out "$scan"
htsr table "$scan" --rule lod --gamma 5 -o "$work/table.json"

train=(owlore train "$model" --data "$data/commonsense/train_61k.json" --table "$work/table.json"
  --active 5 --every 10 --rank 128 --steps 120 --batch 8 --seq-len 256 --lr 3e-4 --warmup 5
  --eval-data 0.004 --eval-every 60 --save-every 25 --out "$run")

"${train[@]}" &
pid=$!
# SIGKILL in the middle of a period: step 66 is done, the newest checkpoint is of step 50.
until grep -qs '"step": 66, ' "$run/metrics.jsonl"; do
  kill -0 $pid 2>/dev/null || { echo "the run ended before it could be killed" >&2; exit 1; }
  sleep 0.2
done
kill -KILL $pid
wait $pid || true
cp "$run/metrics.jsonl" "$work/metrics-when-killed.jsonl"

"${train[@]}" --resume
