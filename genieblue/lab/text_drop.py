"""How much text ability a multimodal model has lost against the base that it was made from: the paper's table 1."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from conversion.create import load_part
from genieblue.lab.lab_file import TextQuestions
from genieblue.lab.report import TEXT_TITLES, markdown_table
from genieblue.lab.results import average, retention
from genieblue.lab.text_tasks import MT_BENCH, run_text_tasks, wants_parts, write_text_tasks

logger = logging.getLogger(__name__)


def text_drop(
    base: str, mllm: str, questions: TextQuestions, *, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of both models by task, as `{"base": …, "mllm": …}`; see `run_text_tasks`.

    `mllm` is any model that `AutoModelForImageTextToText` loads. Raises `ValueError` or `OSError`, before any question
    is asked, for another model, one that cannot be loaded, chats without a chat template, and if nothing is asked.
    """
    options = {"trust_remote_code": trust_remote_code}
    _check_multimodal(mllm, **options)
    tokenizers = {
        name: load_part(f"{name}'s tokenizer", place, AutoTokenizer.from_pretrained, **options)
        for name, place in (("base", base), ("mllm", mllm))
    }
    if tokenizers["base"].get_vocab().items() - tokenizers["mllm"].get_vocab().items():
        logger.warning("%s has other tokens than %s: was it made from this base?", mllm, base)
    kinds = {"base": (AutoModelForCausalLM, base), "mllm": (AutoModelForImageTextToText, mllm)}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "text-tasks")
        write_text_tasks(folder, questions)
        if not any(folder.iterdir()):
            raise ValueError("No text task is asked for: give `facts`, `english`, `gsm8k` or `mt_bench`.")
        if (folder / f"{MT_BENCH}.yaml").is_file():
            for tokenizer in tokenizers.values():
                wants_parts(tokenizer)  # raises if it cannot be asked
        for name, (auto_class, place) in kinds.items():
            model: Any = load_part(name, place, auto_class.from_pretrained, dtype=dtype, **options)
            model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
            scores[name] = run_text_tasks(model, tokenizers[name], folder, base=scores.get("base"))
            del model
    return scores


def _check_multimodal(mllm: str, **options: Any) -> None:
    config = load_part("mllm", mllm, AutoConfig.from_pretrained, **options)
    has_code = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not has_code:
        raise ValueError(
            f"{mllm} has model_type {config.model_type!r}, which AutoModelForImageTextToText does not load: "
            "expected a multimodal model."
        )


def format_text_drop(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The paper's table 1 for two models, as Markdown; each number with its standard error by how questions vary."""
    values = {name: ({task: each["values"] for task, each in of.items()},) for name, of in scores.items()}
    rows = []
    for name, (of_model,) in values.items():
        estimates = [average(({task: each},)).text() for task, each in of_model.items()]
        kept = "" if name == "base" else retention(values["base"], values[name]).text(2)
        rows.append((name, *estimates, average(values[name]).text(2), kept))
    titles = ("model", *(TEXT_TITLES[task] for task in scores["base"]), "average", "retained %")
    return markdown_table(titles, rows)
