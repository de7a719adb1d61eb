"""What is left of a language model's text ability: four tasks on local files, run by lm-eval.

The files are plain ones: in their folder, `lm_eval --include_path . --tasks facts` runs them on any other model too.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.chat_template import QUESTION
from genieblue.evaluation.metrics import standard_error
from genieblue.lab.data import CALCULATOR, numbered_lines
from genieblue.lab.facts import fact_questions
from genieblue.lab.lab_file import TextQuestions
from genieblue.lab.text import split_documents
from modeling_genieblue.staging_genieblue import NewFolder

ENGLISH, FACTS, GSM8K, MT_BENCH = "english", "facts", "gsm8k", "mt_bench"
PIECE = 600  # characters of a held-out text
# lm-eval's descriptions of the tasks; chats are formatted by the model's own template.
TASKS: dict[str, dict[str, Any]] = {
    ENGLISH: {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    FACTS: {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    GSM8K: {
        "output_type": "loglikelihood", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": " {{answer}}", "target_delimiter": "", "metric_list": [{"metric": "perplexity"}],
    },
    MT_BENCH: {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "",
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
NEVER = "<|never written|>"  # lm-eval wants something to stop at beside the model's own end


def text_questions(asked: TextQuestions) -> dict[str, list[dict[str, Any]]]:
    """The questions of each task that is asked for; `ValueError` or `OSError` if there are too few, or bad ones."""
    documents = {
        ENGLISH: [{"text": text} for text in _english(asked.english)],
        FACTS: fact_questions(asked.facts) if asked.facts else [],
        GSM8K: _read(asked.gsm8k, asked.gsm8k_questions, {"question": str, "answer": str}),
        MT_BENCH: [
            {"question": each["turns"][0]} for each in _read(asked.mt_bench, asked.mt_bench_questions, {"turns": list})
        ],
    }  # fmt: skip
    return {name: rows for name, rows in documents.items() if rows}


def write_text_tasks(folder: Path, asked: TextQuestions) -> None:
    """Writes data and descriptions of the tasks that are asked for; `ValueError` or `OSError` if it cannot."""
    documents = text_questions(asked)
    with NewFolder(folder, "writing") as new:
        for name, rows in documents.items():
            data = f"{name}.jsonl"
            task = {
                "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}},
                "test_split": "test", **TASKS[name],
            }  # fmt: skip
            if name == MT_BENCH:
                length = {"max_gen_toks": asked.mt_bench_tokens}
                task["generation_kwargs"] = {"until": [NEVER], **length, "do_sample": False}
            (new.staging / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (new.staging / data).write_text("".join(lines), encoding="utf-8")
        new.put_in_place()


def _english(count: int) -> list[str]:
    texts = _held_out_english() if count else []
    if len(texts) < count:
        raise ValueError(f"`english` is {count}, but there are {len(texts)} pieces: lower it.")
    return texts[:count]


def _held_out_english() -> list[str]:
    """Whole pieces of the documents that no text of `english` is taken from, the documents in turn."""
    bodies = [document.body for document in split_documents().held_out]
    starts = range(0, max(map(len, bodies)), PIECE)
    return [body[start : start + PIECE] for start in starts for body in bodies if len(body) >= start + PIECE]


def _read(path: str | None, count: int, needed: Mapping[str, type]) -> list[dict[str, Any]]:
    """The first lines of a benchmark's file, each with what it needs; answers lose the calculator's notes."""
    if path is None or not count:
        return []
    rows = [row for _, row in itertools.islice(numbered_lines(path), count)]
    if len(rows) < count:
        raise ValueError(f"{path} has {len(rows)} questions, and {count} are asked for: lower it.")
    for number, row in enumerate(rows, start=1):
        for name, kind in needed.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind) or not row[name]:
                raise ValueError(f"{path}: question {number} has no `{name}`: expected {', '.join(needed)} in each.")
        if "turns" in needed and not (isinstance(row["turns"][0], str) and row["turns"][0].strip()):
            raise ValueError(f"{path}: the first of `turns` of question {number} is no text.")
    return [{**row, "answer": CALCULATOR.sub("", row["answer"])} if "answer" in needed else row for row in rows]


def run_text_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    batch_size: int = 16,
    base: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The score of each task in a folder of `write_text_tasks`, from 0 to 100, higher is better.

    Each has `score`, its `standard_error`, and `values`, which by question give both; `base` is what this gave for
    the base itself, which answers are compared with. Raises `ValueError` without lm-eval.
    """
    tasks = {path.stem: _located(path) for path in sorted(folder.glob("*.yaml"))}
    if not tasks:
        return {}
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"Text tasks need {error.name}: pip install 'genieblue[lab]'.") from error
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if MT_BENCH in tasks and wants_parts(tokenizer):
        of_strings = adapter.apply_chat_template
        adapter.apply_chat_template = lambda chat, *given, **options: of_strings(_in_parts(chat), *given, **options)
    manager = TaskManager(include_defaults=False)
    samples: dict[str, list[dict[str, Any]]] = {}
    for as_chats in (False, True):
        asked = [task for name, task in tasks.items() if (name == MT_BENCH) == as_chats]
        if asked:
            found: Any = lm_eval.simple_evaluate(
                model=adapter, tasks=asked, task_manager=manager, bootstrap_iters=0, apply_chat_template=as_chats
            )
            samples |= found["samples"]
    scores = {}
    for name, rows in samples.items():
        rows = sorted(rows, key=lambda row: row["doc_id"])
        if name == MT_BENCH:
            answers = [row["resps"][0][0] for row in rows]
            scores[name] = _likeness(answers, None if base is None else base[name]["answers"], tokenizer)
        elif name == FACTS:
            scores[name] = _mean([100 * float(row["acc"]) for row in rows])
        else:
            scores[name] = _probability_by_byte(_likelihoods(rows))
    return scores


def wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes contents that are lists of parts alone, as many a VLM's does.

    lm-eval gives it strings, of which such a template silently writes nothing. Raises `ValueError` for a template that
    writes neither, and for a tokenizer without one.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {tokenizer.name_or_path} has no chat template, which `{MT_BENCH}` needs.")
    chat = [{"role": "user", "content": QUESTION}]
    for parts in (False, True):
        try:
            text = tokenizer.apply_chat_template(_in_parts(chat) if parts else chat, tokenize=False)
        except Exception:  # of Jinja, or any other, as a template has expressions of Python
            continue
        if QUESTION in str(text):
            return parts
    raise ValueError(
        f"The chat template of {tokenizer.name_or_path} does not write a question, which `{MT_BENCH}` needs."
    )


def _in_parts(chat: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]


def _located(path: Path) -> dict[str, Any]:
    """A task with the place of its data, which in the file is relative to its folder."""
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = task["dataset_kwargs"]["data_files"]
    task["dataset_kwargs"]["data_files"] = {split: str(path.absolute().parent / name) for split, name in data.items()}
    return task


def _likelihoods(rows: Iterable[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """Log-likelihood and bytes of each text."""
    found = []
    for row in rows:
        response = row["resps"][0][0]
        likelihood = response[0] if isinstance(response, (list, tuple)) else response
        text = row["target"] if row["target"] else row["doc"]["text"]
        found.append((float(likelihood), len(str(text).encode())))
    return found


def _probability_by_byte(likelihoods: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The geometric mean of the probabilities that bytes of the texts got, in percent."""
    total = sum(size for _, size in likelihoods)
    mean = sum(likelihood for likelihood, _ in likelihoods) / total
    score = 100 * math.exp(mean)
    # Of a ratio of sums over texts; the score changes by itself times what its logarithm changes by.
    share = total / len(likelihoods)
    values = [score * (1 + (likelihood - mean * size) / share) for likelihood, size in likelihoods]
    return {**_mean(values), "score": score, "bits_per_byte": -mean / math.log(2)}


def _likeness(answers: list[str], base: list[str] | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How much of the base's own answers, by tokens, the answers begin with."""
    shares, equal = [], 0
    for answer, expected in zip(answers, base or answers, strict=True):
        ids, wanted = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, expected))
        common = next((place for place, (one, other) in enumerate(zip(ids, wanted, strict=False)) if one != other),
                      min(len(ids), len(wanted)))  # fmt: skip
        shares.append(100 * common / max(len(ids), len(wanted), 1) if ids or wanted else 100.0)
        equal += ids == wanted
    return {**_mean(shares), "equal_answers": equal / len(answers), "answers": answers}


def _mean(values: list[float]) -> dict[str, Any]:
    return {
        "score": statistics.fmean(values),
        "standard_error": standard_error(values),
        "count": len(values),
        "values": values,
    }
