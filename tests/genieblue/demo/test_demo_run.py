"""The demo as a whole, shortened: what it leaves behind, and that the base's text did not change."""

import json

import pytest
from typer.testing import CliRunner

from genieblue.cli.app import app
from genieblue.demo.run import format_report, run_demo, text_is_unchanged


@pytest.mark.slow
def test_a_shortened_demo_leaves_all_of_its_parts(tmp_path):
    out = tmp_path / "demo"
    report = run_demo(out, scale=0.01)
    assert {path.name for path in out.iterdir()} == {"base", "genieblue", "held-out", "contact-sheet.png"}
    lines = [json.loads(line) for line in (out / "held-out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == report["count"] == 8
    assert all((out / "held-out" / line["image"]).is_file() and line["question"] for line in lines)
    assert text_is_unchanged(report)
    text = format_report(report, out)
    assert "Text logits bit-exact     yes" in text and f"of {report['count']}" in text
    chat = ["chat", str(out / "genieblue"), "--image", str(out / "held-out" / lines[0]["image"]), "--prompt", "?"]
    answered = CliRunner().invoke(app, [*chat, "--json", "--max-new-tokens", "4"])
    assert answered.exit_code == 0 and json.loads(answered.stdout)["view"] == "multimodal"


def test_a_changed_text_answer_is_not_called_unchanged():
    same = {"text_bit_exact": True, "text_generation_exact": True, "perplexity_before": 2.0, "perplexity_after": 2.0}
    assert text_is_unchanged(same)
    for change in ({"text_bit_exact": False}, {"text_generation_exact": False}, {"perplexity_after": 2.0000001}):
        assert not text_is_unchanged({**same, **change})


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="mine.txt, which is not from a demo"):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
