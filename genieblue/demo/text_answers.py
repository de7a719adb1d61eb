"""Text answers of a model in a fresh process, with the code of the model's own folder.

`python -m genieblue.demo.text_answers FOLDER QUESTIONS`, the latter a JSON list, prints one JSON object. A base and a
GenieBlue on it must give equal objects, except for the perplexity of the multimodal view, which a base does not have.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from genieblue.lab.text import held_out_stream, perplexity, split_documents

NEW_TOKENS = 32
WINDOWS = 32  # of held-out text


def text_answers(folder: Path, questions: Sequence[str]) -> dict[str, Any]:
    """Of a base or a GenieBlue, in a new interpreter that runs a GenieBlue's own code.

    Returns `answers`, their `ids`, `sha256_of_logits` of the questions, `perplexity` of held-out text and, for a
    GenieBlue, `perplexity_multimodal_view`.
    """
    command = [sys.executable, "-m", "genieblue.demo.text_answers", str(folder.resolve()), json.dumps(questions)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise ValueError(f"The fresh process failed with exit code {finished.returncode}: see its message above.")
    return json.loads(finished.stdout.splitlines()[-1])


@torch.no_grad()
def answer_all(folder: str, questions: Sequence[str]) -> dict[str, Any]:
    """What `text_answers` returns, in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    digest = hashlib.sha256()
    ids, answers = [], []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        digest.update(model(**inputs).logits.float().numpy().tobytes())
        generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        written = generated[0, inputs["input_ids"].shape[1] :]
        ids.append(written.tolist())
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
    held_out = held_out_stream(tokenizer, split_documents().held_out)
    found = {
        "answers": answers,
        "ids": ids,
        "sha256_of_logits": digest.hexdigest(),
        "perplexity": perplexity(model, held_out, windows=WINDOWS),
    }
    if model.config.model_type == "genieblue":
        found["perplexity_multimodal_view"] = perplexity(model, held_out, windows=WINDOWS, view="multimodal")
    return found


def main() -> None:
    """Prints what `text_answers` returns."""
    transformers_logging.disable_progress_bar()
    found = answer_all(sys.argv[1], json.loads(sys.argv[2]))
    if "modeling_genieblue" in sys.modules:
        raise RuntimeError("The installed package was imported instead of the code in the model's folder.")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
