"""Texts alone in vLLM: CPU and wall time of a GenieBlue and of its base, by turns in one process.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python benchmarks/serving_texts.py demo-out/genieblue demo-out/base

Each round asks both for the same new texts, 16 at once, in an order that changes from round to round. The GenieBlue
has answered an image before.
"""

import argparse
import statistics
import time
from typing import Any

from PIL import Image
from serving import MAX_TOKENS, text_chats
from vllm import LLM, SamplingParams

AT_ONCE = 16


def measure(llm: Any, chats: list, sampling: Any) -> tuple[float, float, list[str]]:
    """Seconds of CPU time and of wall time, and the answers."""
    began, cpu_began = time.perf_counter(), time.process_time()
    outputs = llm.chat(chats, sampling, use_tqdm=False)
    seconds = time.process_time() - cpu_began, time.perf_counter() - began
    return *seconds, [output.outputs[0].text for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of each round")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    settings: Any = {"dtype": options.dtype, "enforce_eager": True, "max_num_seqs": AT_ONCE}
    settings |= {"gpu_memory_utilization": 0.3}
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    engines = [LLM(options.model, **settings), LLM(options.base, **settings)]
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (64, 64))}
    engines[0].chat([{"role": "user", "content": [image]}], sampling, use_tqdm=False)
    ratios = []
    for number in range(-1, options.rounds):  # the first is not counted
        chats = text_chats(options.requests * (number + 2))[-options.requests :]
        order = [0, 1] if number % 2 else [1, 0]
        found = {which: measure(engines[which], chats, sampling) for which in order}
        (cpu, wall, answers), (base_cpu, base_wall, base_answers) = found[0], found[1]
        if number < 0:
            continue
        ratios.append((base_cpu / cpu, base_wall / wall))
        print(
            f"CPU {cpu:.2f} s, base {base_cpu:.2f} s, ratio {ratios[-1][0]:.3f}; "
            f"wall {wall:.2f} s, base {base_wall:.2f} s, ratio {ratios[-1][1]:.3f}; "
            f"answers equal: {answers == base_answers}",
            flush=True,
        )
    medians = [statistics.median(ratio) for ratio in zip(*ratios, strict=True)]
    print(f"median ratio of CPU time {medians[0]:.3f}, of wall time {medians[1]:.3f}")


if __name__ == "__main__":
    main()
