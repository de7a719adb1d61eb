"""lm-eval's `hf` model on the folder of a GenieBlue: the base's own scores."""

import json

import pytest
from tiny_genieblue import save_tiny_pair

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
