"""A folder in which the commands for other harnesses run as docs/evaluation.md prints them."""

import json
import shlex
from pathlib import Path

import torch
from command_line import REPOSITORY, run_json
from datasets import Dataset
from PIL import Image
from tiny_genieblue import save_tiny_pair

MODEL = "reader-2"  # the page's name of the model
PAGE = REPOSITORY / "docs/evaluation.md"
SIGNS = {"What is it?": ("red", 50), "What does the sign on the door say?": ("blue", 90)}
MAX_NEW_TOKENS = 8

COMMON = """test_split: test
output_type: generate_until
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TASKS = {
    "lm-eval": {
        "signs": 'doc_to_image: [image]\ndoc_to_text: "<image>{{question}}"\n',
        "facts": 'doc_to_text: "{{question}}"\n',
    },
    "lmms-eval": {
        "signs": 'doc_to_visual: image\ndoc_to_text: "{{question}}"\n',
        "facts": 'doc_to_text: "{{question}}"\n',
    },
}
GENERATION = {
    "lm-eval": f'{{until: ["never"], max_gen_toks: {MAX_NEW_TOKENS}, do_sample: false}}',
    "lmms-eval": f"{{max_new_tokens: {MAX_NEW_TOKENS}}}",
}


def make_harness_folder(folder: Path) -> dict[str, str]:
    """Writes the model, its base, samples and both harnesses' tasks; returns the model's answers by question.

    The reference of the first sample is the model's own answer, so that half of the answers are right. The weights
    are bfloat16, in which lmms-eval loads every model.
    """
    save_tiny_pair(folder, dtype=torch.bfloat16).rename(folder / MODEL)
    images = {question: Image.new("RGB", (width, 30), colour) for question, (colour, width) in SIGNS.items()}
    references = dict.fromkeys(SIGNS, "a reference")
    for _ in range(2):  # the second time with the answer as reference
        rows = []
        for number, (question, image) in enumerate(images.items()):
            image.save(folder / f"{number}.png")
            messages = [{"role": "user", "content": f"<image>\n{question}"}]
            rows.append({"messages": messages, "images": [f"{number}.png"], "answers": references[question]})
        (folder / "signs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report = folder / "report"
        options = ["--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", 1, "--out", report, "--json"]
        document = run_json("eval", folder / MODEL, "--data", folder / "signs.jsonl", *options)
        found = [json.loads(line) for line in (report / "answers.jsonl").read_text().splitlines()]
        answers = {each["question"]: each["answer"] for each in found}
        references[next(iter(SIGNS))] = answers[next(iter(SIGNS))]
    assert document["scores"][0]["mean"] == 0.5
    rows = [{"question": each, "answer": references[each], "image": image} for each, image in images.items()]
    Dataset.from_list(rows).to_parquet(folder / "samples.parquet")
    for harness, tasks in TASKS.items():
        (folder / "tasks" / harness).mkdir(parents=True)
        for name, fields in tasks.items():
            data = f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {folder / 'samples.parquet'}}}}}\n"
            text = f"task: {name}\n{data}{COMMON}{fields}generation_kwargs: {GENERATION[harness]}\n"
            (folder / "tasks" / harness / f"{name}.yaml").write_text(text)
    return answers


def printed_command(start: str) -> list[str]:
    """The words of the one command of the page that begins with `start`."""
    lines = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if line.startswith(start)]
    return shlex.split(command)


def scores_and_samples(results: Path, task: str) -> tuple[float, list[dict]]:
    """The score of a task and its samples, of the one run that left its results under the folder."""
    (scores,) = [json.loads(path.read_text()) for path in results.rglob("*results*.json")]
    (samples,) = [path.read_text().splitlines() for path in results.rglob(f"*samples_{task}*.jsonl")]
    rows = sorted(map(json.loads, samples), key=lambda row: row["doc_id"])
    return scores["results"][task]["exact_match,none"], rows
