"""The demo as a whole, shortened: what it leaves behind, and that the base's text did not change."""

import json

import pytest
from typer.testing import CliRunner

from genieblue.cli.app import app
from genieblue.demo.run import LEFT_BEHIND, format_report, run_demo, text_is_unchanged
from genieblue.demo.toy import ToyDemo


@pytest.mark.slow
def test_a_shortened_demo_leaves_all_of_its_parts(tmp_path):
    out = tmp_path / "demo"
    report = run_demo(ToyDemo(scale=0.01), out)
    assert {path.name for path in out.iterdir()} == set(LEFT_BEHIND)
    lines = [json.loads(line) for line in (out / "held-out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == report["scores"][0]["count"] == 8
    assert text_is_unchanged(report)
    assert [score["task"] for score in report["scores"]] == ["all", "1 digit", "2 digits", "3 digits", "4 digits"]
    texts = json.loads((out / "text-answers.json").read_text())
    assert len(texts) == len(ToyDemo.text_questions) and all(row["before"] == row["after"] for row in texts)
    assert "logits bit-exact: yes" in format_report(report, out)
    measured = json.loads((out / "genieblue" / "measurements.json").read_text())
    assert {"answers: exact", "text perplexity, base and text view"} <= {row["name"] for row in measured}
    image = str(out / "held-out" / "0000.png")
    chat = ["chat", str(out / "genieblue"), "--image", image, "--prompt", "?", "--json", "--max-new-tokens", "4"]
    answered = CliRunner().invoke(app, chat)
    assert answered.exit_code == 0 and json.loads(answered.stdout)["view"] == "multimodal"


def test_a_changed_text_answer_is_not_called_unchanged():
    same = {
        "questions": 3, "equal_answers": 3, "logits_bit_exact": True, "perplexity_before": 2.0, "perplexity_after": 2.0
    }  # fmt: skip
    assert text_is_unchanged({"text": same})
    for change in ({"logits_bit_exact": False}, {"equal_answers": 2}, {"perplexity_after": 2.0000001}):
        assert not text_is_unchanged({"text": {**same, **change}})


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="mine.txt, which is not from a demo"):
        run_demo(ToyDemo(), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("scale", [0, 1.5])
def test_a_senseless_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"`scale` is {scale}: expected a fraction"):
        ToyDemo(scale=scale)
