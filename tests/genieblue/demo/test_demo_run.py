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
    assert {path.name for path in out.iterdir()} == {
        "base", "genieblue", "genieblue-run", "held-out", "contact-sheet.png"
    }  # fmt: skip
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


@pytest.mark.parametrize(("steps", "is_told"), [(13, True), (2458, False), (3000, False)])
def test_a_demo_that_had_too_little_time_says_why_it_reads_nothing(steps, is_told):
    report = {
        "exact_match": 0.0, "count": 1, "exact_match_by_length": {"1": 0.0}, "perplexity_before": 2.0,
        "perplexity_after": 2.0, "text_bit_exact": True, "text_generation_exact": True,
        "perplexity_multimodal_view": 2.0, "sizes": {"base": 1, "genieblue": 1}, "seconds": 1, "seconds_by_part": {},
        "steps_done_and_planned": {"stage 2": [steps, 3000]}, "answers": [{"image": "0.png", "answer": "1"}],
    }  # fmt: skip
    text = format_report(report, "demo-out")
    assert f"Steps of stage 2          {steps} of 3000" in text
    assert ("too slow or too busy" in text) == is_told
