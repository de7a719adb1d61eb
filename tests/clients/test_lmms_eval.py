"""lmms-eval on the folder of a GenieBlue: image scores are those of `genieblue eval`, text scores the base's own."""

import os
import subprocess

import pytest
from command_line import REPOSITORY
from harness_folder import MODEL, make_harness_folder, printed_command, scores_and_samples
from transformers_server import serving

PROGRAM = REPOSITORY / ".venvs/lmms-eval/bin/lmms-eval"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_of_the_process_are_restored")]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Variables of a process that finds no package of ours, and reaches no Hub."""
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()  # which the server lists
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    return folder, make_harness_folder(folder)


def run(command, folder, env):
    assert PROGRAM.exists(), f"{PROGRAM} is missing: `make test-slow` makes its environment"
    result = subprocess.run([str(PROGRAM), *command[1:]], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_printed_command_gives_image_scores_of_genieblue_eval(harness, env):
    folder, answers = harness
    run(printed_command("lmms-eval --model huggingface "), folder, env)
    score, samples = scores_and_samples(folder / "results", "signs")
    assert {sample["input"]: sample["filtered_resps"] for sample in samples} == answers
    assert score == 0.5


def test_a_server_gives_text_scores_of_the_base(harness, env, tmp_path):
    folder, _ = harness
    found = []
    with serving(folder, env) as address:
        for model in (MODEL, "base"):
            base, key, *command = printed_command("OPENAI_API_BASE=")
            assert base.endswith("/v1")
            command = [word.replace(MODEL, model) for word in command]
            command[command.index("results")] = str(tmp_path / model)
            variables = dict([("OPENAI_API_BASE", f"{address}/v1"), key.split("=")])
            run(command, folder, env | variables)
            score, samples = scores_and_samples(tmp_path / model, "facts")
            found.append((score, [sample["filtered_resps"] for sample in samples]))
    assert found[0] == found[1] and not any("FAILED" in answer for answer in found[0][1])
