"""`genieblue quantize` of a GenieBlue with a VLM: what it prints, what runs its result, and what stays refused."""

import json

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_vlms import save_tiny_vlm_pair
from vlm_training_setup import extract_tiny

from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return extract_tiny(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with calibration chats and held-out ones, half of them with an image."""
    folder = tmp_path_factory.mktemp("data")
    text = "What does the sign on the door say? It says that the shop is closed on Sunday."
    for name, answers in (("chats", 6), ("held-out", 4)):
        rows = []
        for number in range(answers):
            Image.new("RGB", (28, 28), (40 * number, 90, 10)).save(folder / f"{name}-{number}.png")
            question = f"<image>\n{number}?" if number % 2 else f"{text} {number}?"
            answer = {"role": "assistant", "content": f"It is {number}, and {text}"}
            messages = [{"role": "user", "content": question}, answer]
            rows.append({"messages": messages, "images": [f"{name}-{number}.png"] * (number % 2)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_it_is_calibrated_measured_and_asked(model, data, tmp_path):
    result = run(
        "quantize", model, "--out", tmp_path / "new", "--calibration", data / "chats.jsonl", "--sample-length", "24",
        "--eval-data", data / "held-out.jsonl", "--metric", "anls", "--accept-loss",
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["vlm", "w16a16"] for line in lines)
    assert any(line.split()[:2] == ["replicated_blocks", "w4a16"] for line in lines)
    assert "The VLM's vision side and connector, and its own norms" in result.output
    assert any(line.startswith("reference answers, multimodal view") for line in lines)
    by_part = [line for line in lines if line.split()[:1] == ["replicated_blocks"]][-1]
    assert by_part.split()[1] == "–"  # text runs none of it
    info = run_json("info", tmp_path / "new", "--json")["parts"]
    assert (info["vlm"]["precision"], info["lora"]["precision"]) == ("w16a16", "w8a16")
    answer = run_json(
        "chat", tmp_path / "new", "--image", data / "chats-1.png", "--prompt", "1?", "--max-new-tokens", "3", "--json"
    )
    assert answer["view"] == "multimodal"


@pytest.mark.parametrize(("copies", "part"), [(0, "replicated_blocks"), (4, "lora")])
def test_a_part_without_parameters_has_no_bits(copies, part, tmp_path):
    vlm, base = save_tiny_vlm_pair(tmp_path)
    mine = extract_genieblue(vlm, base, tmp_path / "mine", Choice(copies=copies, rank=4)).output
    result = run("quantize", mine, "--out", tmp_path / "new")
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith(part))
    assert (row[2], row[-1]) == ("0", "–")


@pytest.mark.parametrize("option", ["--vision", "--projector"])
def test_a_vision_side_in_few_bits_is_refused(model, tmp_path, option):
    error = error_of("quantize", model, "--out", tmp_path / "new", option, "w8a16")
    assert "stay at 16 bits" in error and "leave out --vision and --projector" in error
    assert not (tmp_path / "new").exists()


def test_an_export_for_an_npu_says_why_it_cannot_be(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.qnn.npu.sessions.check_platform", lambda: None)
    monkeypatch.setattr("conversion.qnn.npu.sessions.check_libraries_installed", lambda: None)
    options = "--soc", "sm8750", "--calibration", data / "chats.jsonl"
    assert "sees with a whole VLM (llava)" in error_of("export", "qnn", model, "--out", tmp_path / "new", *options)
