"""An engine of vLLM in a process of its own: `python vllm_engine.py REQUEST ANSWERS`, both JSON files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def save_wide_pair(folder: Path, family: str, prepare: Callable = lambda _: None, **processor_options: str) -> Path:
    """A tiny GenieBlue as `folder/genieblue` on `folder/base`, with heads as wide as vLLM's attention needs them.

    `prepare` may change the saved base first.
    """
    from tiny_genieblue import tiny_genieblue
    from tiny_models import save_tiny_base
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling_genieblue.saving_genieblue import processor_for

    save_tiny_base(family, folder / "base", hidden_size=128, head_dim=32)
    prepare(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = tiny_genieblue(base=base)
    processor = processor_for(model.config, AutoTokenizer.from_pretrained(folder / "base"), **processor_options)
    model.save_pretrained(folder / "genieblue", processor=processor)
    return folder / "genieblue"


def vllm_answers(folder: Path, model: Path, rounds: list[list], max_tokens: int = 12, **settings) -> list[list[dict]]:
    """Greedy answers to the chats of each round: `ids` of the answer, and how many tokens of the prompt were `cached`.

    With `disable_log_stats=False` the file `folder/preemptions` then holds how often a request was preempted.
    `RuntimeError` with the last lines of the process where it fails.
    """
    folder.mkdir(exist_ok=True)
    request = {"model": str(model), "rounds": rounds, "max_tokens": max_tokens, "settings": {**SETTINGS, **settings}}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, __file__, str(folder / "request.json"), str(folder / "answers.json")]
    result = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout[-1000:] + result.stderr[-4000:])
    return json.loads((folder / "answers.json").read_text())


def main(request: str, answers: str) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(request).read_text())
    llm = LLM(asked["model"], **asked["settings"])
    greedy = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    rounds = [llm.chat(chats, greedy, use_tqdm=False) for chats in asked["rounds"]]
    found = [
        [{"ids": list(each.outputs[0].token_ids), "cached": each.num_cached_tokens} for each in outputs]
        for outputs in rounds
    ]
    Path(answers).write_text(json.dumps(found))
    if not asked["settings"].get("disable_log_stats", True):
        counts = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
        Path(answers).with_name("preemptions").write_text(str(sum(counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
