"""lm-eval on the folder of a GenieBlue: text scores are the base's own, image scores those of `genieblue eval`."""

import functools
import json
import sys

import pytest
from harness_folder import MODEL, make_harness_folder, printed_command, scores_and_samples
from tiny_genieblue import save_tiny_pair

lm_eval = pytest.importorskip("lm_eval", reason="the extra `clients` installs it")
tasks, command_line = (pytest.importorskip(f"lm_eval.{name}") for name in ("tasks", "__main__"))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_of_the_process_are_restored")]

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
    "tiny_rolling": """output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Scores and answers of `genieblue` or `base` in one of lm-eval's models, as prompts or as chats."""
    folder = tmp_path_factory.mktemp("texts")
    save_tiny_pair(folder)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        files = f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{files}{text}")
    task_manager = tasks.TaskManager(include_path=str(folder / "tasks"))

    @functools.cache
    def evaluate(model, name, chats):
        options = {"trust_remote_code": True} if name == "genieblue" else {}
        options |= {"image_string": "<image>"} if model == "hf-multimodal" else {}
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(folder / name), "dtype": "float32", **options},
            tasks=list(TASKS),
            task_manager=task_manager,
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
            apply_chat_template=chats,
        )
        answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
        return results["results"], answers

    return evaluate


@pytest.mark.parametrize("chats", [False, True], ids=["prompts", "chats"])
@pytest.mark.parametrize("model", ["hf", "hf-multimodal"])
def test_text_scores_and_answers_are_the_bases(model, chats, evaluate):
    scores, answers = evaluate(model, "genieblue", chats)
    assert {task: len(found) for task, found in answers.items()} == dict.fromkeys(TASKS, len(ROWS))
    assert (scores, answers) == evaluate("hf", "base", chats)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    return folder, make_harness_folder(folder)


def run(command, folder, monkeypatch):
    """Runs a command of lm-eval in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", command)
    command_line.cli_evaluate()


def test_the_printed_command_gives_text_scores_of_the_base(harness, tmp_path, monkeypatch):
    found = []
    for model in (MODEL, "base"):
        command = [word.replace(MODEL, model) for word in printed_command("lm_eval --model hf ")]
        command[command.index("results")] = str(tmp_path / model)
        run(command, harness[0], monkeypatch)
        score, samples = scores_and_samples(tmp_path / model, "facts")
        found.append((score, [sample["resps"] for sample in samples]))
    assert found[0] == found[1]


def test_the_printed_command_gives_image_scores_of_genieblue_eval(harness, monkeypatch):
    folder, answers = harness
    run(printed_command("lm_eval --model hf-multimodal "), folder, monkeypatch)
    score, samples = scores_and_samples(folder / "results", "signs")
    assert {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples} == answers
    assert score == 0.5
