#!/usr/bin/env bash
# A GenieBlue and its base alone in vLLM on one GPU: text-only and mixed load, in at most 8 minutes.
#   OUT=DIR benchmarks/serving_gpu.sh MODEL BASE DATA.jsonl
# Writes $OUT/serving_gpu.json: p50 and p95 latency, tokens/s, errors and host memory of each load.
# Needs `pip install 'genieblue[vllm]'` and psutil.
set -euo pipefail
model=$1 base=$2 data=$3
cd "$(dirname "$0")/.."
PYTHONPATH=. timeout 480 python benchmarks/serving.py "$model" "$data" --base "$base" --dtype bfloat16 \
    --requests 1000 --clients 64 --no-check --out "${OUT:?the folder for the figures}/serving_gpu.json" \
    --max-model-len 4096 --gpu-memory-utilization 0.5
