#!/usr/bin/env bash
# A GenieBlue and its base alone in vLLM on one GPU: text-only and mixed load, in at most 8 minutes.
#   OUT=DIR benchmarks/serving_gpu.sh MODEL BASE DATA.jsonl [further options of benchmarks/serving.py]
# Writes $OUT/serving_gpu_check.json, a small load in float32 with the answers that equal transformers', and
# $OUT/serving_gpu.json after each load: p50 and p95 latency, tokens/s, errors, CPU time and host memory.
# Needs `pip install 'genieblue[vllm]'`.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
model="$1" base="$2" data="$3"
out="${OUT:?the folder for the figures}"
others=("${@:4}")

measure() {  # SECONDS OPTIONS...; an interrupt, unlike an end, lets it stop its server
    PYTHONPATH="$root" timeout --signal=INT --kill-after=15 "$1" python "$root/benchmarks/serving.py" "$model" "$data" \
        --max-length 4096 --gpu-memory-utilization 0.5 "${@:2}" "${others[@]}"
}

measure 130 --dtype float32 --requests 16 --clients 4 --out "$out/serving_gpu_check.json" ||
    echo "The load with checked answers failed: what follows are speeds alone." >&2
measure 320 --dtype bfloat16 --requests 1000 --clients 64 --no-check --base "$base" --out "$out/serving_gpu.json"
