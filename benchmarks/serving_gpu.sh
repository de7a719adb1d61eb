#!/usr/bin/env bash
# A GenieBlue and its base alone in vLLM on one GPU: text-only and mixed load, in at most 8 minutes.
#   OUT=DIR benchmarks/serving_gpu.sh MODEL BASE DATA.jsonl [further options of benchmarks/serving.py]
# Writes $OUT/serving_gpu.json after each load: p50 and p95 latency, tokens/s, errors, CPU time and host memory.
# Needs `pip install 'genieblue[vllm]'`.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
# An interrupt, unlike an end, lets it stop its server.
PYTHONPATH="$root" timeout --signal=INT --kill-after=40 430 python "$root/benchmarks/serving.py" "$1" "$3" \
    --base "$2" --dtype bfloat16 --requests 1000 --clients 64 --no-check --max-length 4096 \
    --out "${OUT:?the folder for the figures}/serving_gpu.json" --gpu-memory-utilization 0.5 "${@:4}"
