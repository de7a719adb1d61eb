"""Evaluates the demo in a fresh process: `python -m genieblue.demo.answers demo-out` prints one JSON report.

It uses only the two repositories: the base through `AutoModelForCausalLM`, the GenieBlue through `AutoModel` with the
code in its own folder.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from genieblue.demo.text import held_out_stream, perplexity, split_documents

TEXT_PROMPTS = ("The import statement", "A function call always", "Explain: Numeric literals\n")
BATCH_SIZE = 25


@torch.no_grad()
def ask_all(out: Path) -> dict[str, Any]:
    """Answers all held-out scans and compares the text view with the base; see `genieblue.demo.run`."""
    base = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    model = AutoModel.from_pretrained(out / "genieblue", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out / "genieblue", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    lines = [json.loads(line) for line in (out / "held-out" / "answers.jsonl").read_text().splitlines()]
    answers = read_scans(model, processor, out / "held-out", lines)
    hits: dict[int, list[bool]] = defaultdict(list)
    for line in answers:
        hits[len(line["answer"])].append(line["said"] == line["answer"])
    held_out = held_out_stream(tokenizer, split_documents().held_out)
    exact, generation_exact = compare_text(base, model, tokenizer, held_out)
    return {
        "count": len(answers),
        "exact_match": sum(map(sum, hits.values())) / len(answers),
        "exact_match_by_length": {str(length): sum(row) / len(row) for length, row in sorted(hits.items())},
        "perplexity_after": perplexity(model, held_out),
        "perplexity_multimodal_view": perplexity(model, held_out, view="multimodal"),
        "text_bit_exact": exact,
        "text_generation_exact": generation_exact,
        "answers": answers,
    }


def read_scans(model: Any, processor: Any, folder: Path, lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """The held-out lines with the model's answer as `said`, generated greedily in batches."""
    answers = []
    for start in range(0, len(lines), BATCH_SIZE):
        batch = lines[start : start + BATCH_SIZE]
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.open(folder / line["image"])},
                        {"type": "text", "text": line["question"]},
                    ],
                }
            ]
            for line in batch
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [{**line, "said": text.strip()} for line, text in zip(batch, texts, strict=True)]
    return answers


def compare_text(base: Any, model: Any, tokenizer: Any, ids: torch.Tensor) -> tuple[bool, bool]:
    """Whether text requests give the base's logits and generated ids bit for bit."""
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)[:32]
    logits_equal = torch.equal(model(input_ids=rows).logits, base(input_ids=rows).logits)
    generation_equal = all(
        torch.equal(model.generate(**inputs, max_new_tokens=24), base.generate(**inputs, max_new_tokens=24))
        for inputs in (tokenizer(prompt, return_tensors="pt") for prompt in TEXT_PROMPTS)
    )
    return logits_equal, generation_equal


def main() -> None:
    """Prints the report as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    transformers_logging.disable_progress_bar()
    report = ask_all(parser.parse_args().out)
    if "modeling_genieblue" in sys.modules:
        raise RuntimeError("The installed package was imported instead of the code in the model's folder.")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
