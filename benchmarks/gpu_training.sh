#!/usr/bin/env bash
# Stage 2 at full size on one GPU, in at most 8 minutes: tokens/s, share of the GPU's peak, peak memory. Writes $OUT/gpu_training.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${OUT:-.}"
timeout 420 python3 -m benchmarks.training step --shape bluelm-3b --batch 8 --length 512 --rounds 3 --device cuda --json \
  | tail -1 > "$OUT/gpu_training.json"
python3 - "$OUT/gpu_training.json" <<'PY'
import json, sys

import torch

rows = json.load(open(sys.argv[1]))
# Dense bf16 peak in FLOP/s by name, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
name = torch.cuda.get_device_name()
peak = next((value for key, value in PEAKS.items() if key in name), None)
PARAMETERS = 2.7e9
for contender, row in rows.items():
    # 6 FLOP a parameter and token where all of it trains, 4 where the base is frozen.
    flops = (6 if contender == "full fine-tuning" else 4) * PARAMETERS * row["tokens/s"]
    share = "unknown" if peak is None else f"{flops / peak:.1%}"
    print(f"{contender:18} {row['tokens/s']:>10,.0f} tokens/s  {share:>8} of peak  {row['peak memory, GB']:.1f} GB")
PY
