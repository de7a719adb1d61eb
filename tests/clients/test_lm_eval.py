"""lm-eval on the folder of a GenieBlue: `hf` gives the base's own scores, `hf-multimodal` sees."""

import json

import pytest
from datasets import Dataset
from PIL import Image
from tiny_genieblue import save_tiny_pair
from transformers import AutoModelForImageTextToText, AutoProcessor

lm_eval = pytest.importorskip("lm_eval", reason="the extra `clients` installs it")
pytestmark = pytest.mark.slow

ROWS = [
    {"question": "What does the sign say?", "choices": [" closed", " open"], "answer": 0},
    {"question": "How many digits are there?", "choices": [" four", " one"], "answer": 0},
    {"question": "A tall tree", "choices": [" stands near the river", " falls"], "answer": 0},
]
COMMON = """dataset_path: json
test_split: test
doc_to_text: "{{question}}"
"""
TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_answer": """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}

IMAGE_TASK = """task: tiny_image
dataset_path: parquet
test_split: test
output_type: generate_until
doc_to_image: [images]
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["never"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_scores_and_answers_are_the_bases(tmp_path):
    folder = save_tiny_pair(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{files}{text}")

    def evaluate(model, **options):
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32", **options},
            tasks=list(TASKS),
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
        )
        answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
        return results["results"], answers

    scores, answers = evaluate(folder, trust_remote_code=True)
    assert len(answers["tiny_choice"]) == len(answers["tiny_answer"]) == len(ROWS)
    assert (scores, answers) == evaluate(tmp_path / "base")


def test_images_are_answered_as_by_the_model(tmp_path):
    folder = save_tiny_pair(tmp_path)
    images = [Image.new("RGB", (50, 30), "red"), Image.new("RGB", (90, 30), "blue")]
    questions = ["<image> What is it?", "<image> What does the sign on the door say?"]
    rows = [{"question": q, "answer": "red", "images": i} for q, i in zip(questions, images, strict=True)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks").mkdir()
    files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.parquet'}}}}}\n"
    (tmp_path / "tasks" / "tiny_image.yaml").write_text(IMAGE_TASK + files)
    options = {"pretrained": str(folder), "dtype": "float32", "trust_remote_code": True, "max_images": 1}
    results = lm_eval.simple_evaluate(
        model="hf-multimodal",
        # By itself it looks the image token up in the base's tokenizer, which has none.
        model_args={**options, "image_string": "<image>"},
        tasks=["tiny_image"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    model, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
    for sample, question, image in zip(results["samples"]["tiny_image"], questions, images, strict=True):
        inputs = processor(text=question, images=image, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert sample["resps"] == [processor.batch_decode(ids, skip_special_tokens=True)]
