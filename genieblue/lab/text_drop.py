"""How much text ability a multimodal model has lost against the base that it was made from: the paper's table 1."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from genieblue.lab.lab_file import TextQuestions
from genieblue.lab.report import TEXT_TITLES, markdown_table
from genieblue.lab.results import Estimate
from genieblue.lab.text_tasks import run_text_tasks, write_text_tasks


def text_drop(
    base: str, mllm: str, questions: TextQuestions, *, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of both models by task, as `{"base": …, "mllm": …}`; see `run_text_tasks`.

    `mllm` is any model that `AutoModelForImageTextToText` loads. Raises `ValueError` if nothing is asked.
    """
    kinds = {"base": (AutoModelForCausalLM, base), "mllm": (AutoModelForImageTextToText, mllm)}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "text-tasks")
        write_text_tasks(folder, questions)
        if not any(folder.iterdir()):
            raise ValueError("No text task is asked for: give `facts`, `english`, `gsm8k` or `mt_bench`.")
        for name, (auto_class, place) in kinds.items():
            model: Any = auto_class.from_pretrained(place, dtype=dtype, trust_remote_code=trust_remote_code)
            model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            scores[name] = run_text_tasks(model, tokenizer, folder, base=scores.get("base"))
            del model
    return scores


def format_text_drop(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The paper's table 1 for two models, as Markdown."""
    tasks = list(scores["base"])
    averages = {name: sum(each["score"] for each in of.values()) / len(of) for name, of in scores.items()}
    rows = []
    for name, of_model in scores.items():
        estimates = (Estimate(each["score"], each["standard_error"]).text() for each in of_model.values())
        kept = "" if name == "base" else f"{100 * averages[name] / averages['base']:.2f}"
        rows.append((name, *estimates, f"{averages[name]:.2f}", kept))
    return markdown_table(("model", *(TEXT_TITLES[task] for task in tasks), "average", "retained %"), rows)
