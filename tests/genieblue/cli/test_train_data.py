"""`genieblue train --data`: every source is planned, mixtures are trained and resumed, wrong ones refused first."""

import io
import json
import re
import shlex
import shutil
import tarfile

import pytest
from command_line import REPOSITORY, error_of, run, run_json
from PIL import Image
from tiny_genieblue import save_tiny_pair

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


def chat(question: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}], **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same four samples, three of them with an image, in every form."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (48, 24), "red").save(folder / "red.png")
    image = (folder / "red.png").read_bytes()
    rows = [chat(f"<image>{number}?") for number in range(3)]
    text = chat("Why?")
    lines = [json.dumps({**row, "images": ["red.png"]}) + "\n" for row in rows]
    (folder / "a.jsonl").write_text("".join(lines[:2]))
    (folder / "b.jsonl").write_text(lines[2] + json.dumps(text) + "\n")
    table = datasets.Dataset.from_list([{**row, "images": [{"bytes": image, "path": None}]} for row in [*rows]])
    table = datasets.concatenate_datasets([table, datasets.Dataset.from_list([{**text, "images": []}])])
    table.to_parquet(folder / "all.parquet")
    table.save_to_disk(folder / "saved")
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number, row in enumerate([*rows, text]):
            members = {"json": json.dumps(row).encode(), **({"png": image} if row is not text else {})}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("source", ["all.parquet", "all.tar", "saved", "*.jsonl"])
def test_every_source_is_planned_alike(source, folder, model, tmp_path):
    command = ["train", "--model", model, "--data", folder / source, "--out", tmp_path / "out", "--plan", "--json"]
    for stage, samples in ((1, 3), (2, 4)):
        assert run_json(*command, "--stage", stage)["samples"] == samples


def test_a_mixture_is_planned_with_its_shares_and_trained(folder, model, tmp_path):
    data = ["--data", f"pictures={folder / 'a.jsonl'}:3", "--data", f"{folder / 'b.jsonl'}:1"]
    command = ["train", "--stage", 2, "--model", model, *data, "--out", tmp_path / "out"]
    plan = run_json(*command, "--plan", "--json")
    assert plan["shares"] == {"pictures": 0.75, str(folder / "b.jsonl"): 0.25} and plan["samples"] == 8
    assert "Data: pictures 75.0%, " in run(*command, "--plan").stdout
    run(*command, "--batch-size", 4)
    saved = (tmp_path / "out-run" / "run.yaml").read_text()
    assert f"- pictures={folder / 'a.jsonl'}:3" in saved
    run("train", "--config", tmp_path / "out-run" / "run.yaml", "--resume")  # the same data, so it is finished
    other = error_of("train", "--config", tmp_path / "out-run" / "run.yaml", "--resume", "--text-share", 0.5)
    assert "sha256 of the data" in other


def commands_of_examples():
    """The command that each example of a run prints at its head."""
    return [
        pytest.param(printed, id=example.stem)
        for example in sorted((REPOSITORY / "examples").glob("*.yaml"))
        for printed in re.findall(r"^# genieblue (train .*)", example.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("printed", commands_of_examples())
def test_the_command_in_an_example_works_as_printed(printed, folder, model, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    command = shlex.split(printed)
    (tmp_path / command[command.index("--model") + 1]).symlink_to(model)
    shutil.copy(folder / "red.png", tmp_path)
    shutil.copy(folder / "b.jsonl", tmp_path / command[command.index("--data") + 1])
    monkeypatch.chdir(tmp_path)
    assert run_json(*command, "--plan", "--json")["steps"] >= 300


def test_a_run_file_names_parts_and_image_roots_by_mappings(folder, model, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(chat("<image>?", images=["here/red.png"])) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"stage: 2\nmodel: {model}\nout: {tmp_path / 'out'}\ntext_share: 0.5\nimage_root: {{here: {folder}}}\n"
        f"data:\n  pictures: {tmp_path / 'c.jsonl'}\n  mixed: {folder / 'b.jsonl'}\n"
    )
    plan = run_json("train", "--config", tmp_path / "run.yaml", "--plan", "--json")
    assert plan["shares"] == {"pictures": 0.25, "mixed": 0.75} and plan["samples"] == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "a.jsonl:0", "--data", "b.jsonl:1"], "The weight of 'a.jsonl' is 0"),
        (["--data", "a.jsonl", "--data", "none.jsonl"], "none.jsonl is not a file"),
        (["--data", "a.jsonl", "--data", "./a.jsonl"], "count twice"),
        (["--data", "a.jsonl", "--text-share", "2"], "expected a number from 0 to 1"),
        (["--data", "a.jsonl", "--text-share", "0.5"], "every sample has an image"),
        (["--data", "none.jsonl", "--report-to", "tensorbord"], "names 'tensorbord', which is not installed"),
        (["--data", "a.jsonl", "--image-root", "x"], "not NAME=FOLDER"),
        (["--data", "a.jsonl", "--image-root", "x=.", "--image-root", "x=."], "'x' is given twice"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_data_is_refused_before_the_model_is_loaded(options, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("genieblue.cli.train.load_chat", lambda *arguments: pytest.fail("loaded"))
    assert message in error_of("train", "--stage", 2, "--model", "m", "--out", tmp_path / "out", *options)


def test_the_home_folder_is_expanded_in_every_option(folder, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, path in {"m": model, "base": model.parent / "base"}.items():
        (tmp_path / name).symlink_to(path)
    for name in ("a.jsonl", "red.png"):
        shutil.copy(folder / name, tmp_path)
    command = ["train", "--stage", 2, "--model=~/m", "--base=~/base", "--data=~/a.jsonl", "--out=~/out", "--plan"]
    run(*command)
    assert f"{tmp_path}/missing is not a local folder" in error_of(*command, "--on-quantized=~/missing")
