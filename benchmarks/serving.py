"""A GenieBlue under load in vLLM: errors, answers against transformers', latency, tokens/s, CPU time and memory.

    .venvs/vllm/bin/python benchmarks/serving.py demo-out/genieblue demo-out/held-out/answers.jsonl

Texts and images alternate. With --base the base alone answers the same texts in plain vLLM. Run it where vLLM is
installed (`make test-vllm` makes such an environment); transformers' answers come first, and with `--no-check` never.
Options that are not named below are vLLM's.
"""

import argparse
import base64
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import APIError, OpenAI
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import modeling_genieblue  # noqa: F401  # registers the classes
from genieblue.serving.vllm.server import ServerSettings, start, stop

MAX_TOKENS = 16


def image_chats(data: Path, count: int) -> list[list[dict]]:
    """The first `count` questions of a data file, repeated if need be, with their images in the request."""
    lines = data.read_text().splitlines()
    chats = []
    for number in range(count):
        messages = json.loads(lines[number % len(lines)])["messages"][:1]
        for part in messages[0]["content"]:
            if part["type"] == "image":
                content = base64.b64encode((data.parent / part.pop("image")).read_bytes()).decode()
                part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
        chats.append(messages)
    return chats


def text_chats(count: int) -> list[list[dict]]:
    """`count` different texts of different lengths."""
    return [
        [{"role": "user", "content": f"Explain: {'the statement ' * (number % 7)}number {number}"}]
        for number in range(count)
    ]


@torch.no_grad()
def transformers_answers(chats: list[list[dict]], model: Any, formatter: Any) -> list[str]:
    """Greedy answers, one by one; equal chats are asked once."""
    known: dict[str, str] = {}
    for chat in chats:
        if (key := json.dumps(chat)) not in known:
            inputs = formatter.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
            known[key] = formatter.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [known[json.dumps(chat)] for chat in chats]


def expected_answers(model: Path, texts: list, images: list) -> tuple[list[str], list[str]]:
    """transformers' answers: of the base alone to texts, of the GenieBlue to images."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.to("cuda" if torch.cuda.is_available() else "cpu")
    base = whole.language_model
    tokenizer = AutoTokenizer.from_pretrained(model)
    return transformers_answers(texts, base, tokenizer), transformers_answers(
        images, whole, AutoProcessor.from_pretrained(model)
    )


class Server:
    """A running server, and what its processes have taken."""

    def __init__(self, settings: ServerSettings):
        self._process = start(settings)
        self._name = settings.name
        self._client = OpenAI(base_url=f"{settings.address}/v1", api_key="none", max_retries=0, timeout=3600)

    def stop(self) -> None:
        """Ends its processes."""
        self._client.close()
        stop(self._process)

    def ask(self, chat: list[dict]) -> tuple[str | None, float, int]:
        """The answer (`None` for an error), its seconds and tokens."""
        began = time.perf_counter()
        try:
            response = self._client.chat.completions.create(
                model=self._name, messages=chat, temperature=0, max_tokens=MAX_TOKENS
            )
        except APIError as error:
            print(error)
            return None, time.perf_counter() - began, 0
        return response.choices[0].message.content, time.perf_counter() - began, response.usage.completion_tokens

    def taken(self) -> tuple[float, int]:
        """Seconds of CPU time, user and system, and MB of resident memory, of all its processes."""
        process = psutil.Process(self._process.pid)
        processes = [process, *process.children(recursive=True)]
        seconds = sum(sum(each.cpu_times()[:2]) for each in processes)
        return seconds, sum(each.memory_info().rss for each in processes) >> 20

    def load(self, chats: list[list[dict]], clients: int) -> tuple[list[str | None], dict[str, Any]]:
        """Answers to all chats from `clients` clients at once, and figures."""
        self.ask(chats[0])
        cpu_before, memory = self.taken()
        results, memories, began = [], [memory], time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for result in pool.map(self.ask, chats):
                results.append(result)
                if len(results) % max(len(chats) // 5, 1) == 0:
                    memories.append(self.taken()[1])
        seconds, cpu_seconds = time.perf_counter() - began, self.taken()[0] - cpu_before
        latencies = statistics.quantiles([latency for _, latency, _ in results], n=20)
        tokens = sum(count for *_, count in results)
        return [answer for answer, _, _ in results], {
            "requests": len(chats),
            "errors": sum(answer is None for answer, _, _ in results),
            "p50_s": round(latencies[9], 3),
            "p95_s": round(latencies[18], 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "tokens_per_cpu_s": round(tokens / cpu_seconds, 1),
            "memory_mb": memories,
        }


def equal_answers(found: list[str | None], wanted: list[str]) -> str:
    """How many answers are the wanted ones, of how many."""
    equal = sum(answer == right for answer, right in zip(found, wanted, strict=True))
    return f"{equal} of {len(wanted)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="JSONL with questions about images")
    parser.add_argument("--requests", type=int, default=500, help="half of them with images")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--base", type=Path, help="the base, to be measured alone with the same texts")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer; default: the base's limit")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--no-check", action="store_true", help="do not compare with transformers' answers")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options, vllm_options = parser.parse_known_args()

    half = options.requests // 2
    texts, images = text_chats(half), image_chats(options.data, half)
    mixed = [chat for pair in zip(texts, images, strict=True) for chat in pair]
    expected = None if options.no_check else expected_answers(options.model, texts, images)
    figures: list[dict[str, Any]] = []

    def measure(model: Path, loads: dict[str, list[list[dict]]]) -> None:
        settings = {"max_length": options.max_length, "dtype": options.dtype, "other": vllm_options}
        server = Server(ServerSettings(str(model), tensor_parallel=options.tensor_parallel, **settings))
        try:
            for name, chats in loads.items():
                answers, found = server.load(chats, options.clients)
                if expected is not None:
                    kinds = {"texts": answers[::2], "images": answers[1::2]} if chats is mixed else {"texts": answers}
                    for (kind, given), wanted in zip(kinds.items(), expected, strict=False):
                        found[f"equal_{kind}"] = equal_answers(given, wanted)
                figures.append({"load": name, **found})
                print(json.dumps(figures[-1]), flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps(figures, indent=2) + "\n")
        finally:
            server.stop()

    # Texts first: later ones may find their beginnings in the cache.
    measure(options.model, {"text only": texts, "mixed": mixed})
    if options.base is not None:
        measure(options.base, {"text only, base alone": texts})


if __name__ == "__main__":
    main()
