"""Held-out data for a verdict: what is measured of which sample, and what data is refused or remarked on."""

import json
import logging

import pytest
import torch
from PIL import Image
from tiny_genieblue import change_adapter
from training_setup import make_base, make_model

from conversion.verdict import Limits
from genieblue.evaluation.held_out import HeldOutData, compare_with_calibration
from genieblue.evaluation.samples import EvaluationDataset
from hub_cards.verdicts import FAILED, PLAIN_TEXT, REFERENCES, UNDECIDED

WORDS = "The answer is in the question, and the question is in the other answer.\n\n"


def question(text: str, answer: str | None = "4", image: bool = False, **more) -> dict:
    content = "<image>\n" + text if image else text
    images = {"images": ["red.png"]} if image else {}
    answers = {} if answer is None else {"answers": answer}
    return {"messages": [{"role": "user", "content": content}], **images, **answers, **more}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (48, 24), "red").save(tmp_path / "red.png")

    def write_lines(*rows, name="held-out.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if rows and isinstance(rows[0], dict)
                        else "".join(rows), encoding="utf-8")  # fmt: skip
        return path

    return write_lines


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model, processor = make_model(make_base(tmp_path_factory.mktemp("base") / "base"))
    return change_adapter(model).eval(), processor


def test_each_sample_is_measured_in_its_view(pair, write):
    model, processor = pair
    data = HeldOutData([write(question("How many?"), question("Which?", image=True)), write(WORDS, name="text.md")],
                       processor)  # fmt: skip
    measured = data.measure(model)
    assert [answer.view for answer in measured.answers] == ["text", "multimodal"]
    assert set(measured.losses) == {("text", REFERENCES), ("multimodal", REFERENCES), ("text", PLAIN_TEXT)}
    verdict = data.verdict(measured, data.measure(model))
    assert [each["ratio"] for view in verdict["views"].values() for each in view["perplexity"]] == [1.0] * 3
    assert [(each["name"], each["of"]) for each in verdict["data"]] == [
        ("held-out.jsonl", REFERENCES), ("text.md", PLAIN_TEXT)
    ]  # fmt: skip
    assert all(len(each["sha256"]) == 64 for each in verdict["data"])


def test_the_loss_of_a_reference_is_its_likelihood_with_the_stop_token(pair, write):
    model, processor = pair
    data = HeldOutData([write(question("How many?", "4", choices=["4", "5"]))], processor)
    ((loss, tokens),) = data.measure(model).losses["text", REFERENCES]
    from genieblue.evaluation.answering import ModelAnswerer

    likelihood = ModelAnswerer(model, processor).log_likelihoods(data.chats[0][0])[0]
    assert tokens == 2 and loss == pytest.approx(-likelihood, abs=1e-4)


def test_text_is_predicted_within_windows(pair, write):
    model, processor = pair
    data = HeldOutData([write(WORDS * 60, name="long.txt")], processor)
    losses = data.measure(model).losses["text", PLAIN_TEXT]
    assert len(losses) > 8 and [tokens for _, tokens in losses[:9]] == [64] * 7 + [63, 64]  # of 511, then the next


def test_a_damaged_view_fails_and_the_other_one_is_not_blamed(pair, write):
    model, processor = pair
    data = HeldOutData([write(*(question(f"{n}?", "12", image=bool(n % 2)) for n in range(12)))], processor,
                       limits=Limits(perplexity_ratio=1.01))  # fmt: skip
    before = data.measure(model)
    with torch.no_grad():
        model.multi_modal_projector.linear_2.weight.mul_(40)
    try:
        verdict = data.verdict(before, data.measure(model))
    finally:
        with torch.no_grad():
            model.multi_modal_projector.linear_2.weight.div_(40)
    assert verdict["views"]["text"]["perplexity"][0]["ratio"] == 1
    assert verdict["views"]["multimodal"]["perplexity"][0]["ratio"] != 1
    assert all("text view is" not in reason for reason in verdict["reasons"])


def test_logits_are_of_a_few_samples_of_each_view(pair, write):
    model, processor = pair
    data = HeldOutData([write(*(question(f"{n}?", image=n < 20) for n in range(40)))], processor)
    found = data.logits(model)
    assert {view: len(logits) for view, logits in found.items()} == {"text": 16, "multimodal": 16}


def test_one_sample_is_too_few(pair, write):
    model, processor = pair
    data = HeldOutData([write(question("How many?"))], processor)
    verdict = data.verdict(data.measure(model), data.measure(model))
    assert verdict["result"] == UNDECIDED != FAILED
    assert "multimodal view was not measured" in verdict["reasons"][-1]


def test_chats_without_a_reference_are_refused_with_file_and_line(pair, write):
    with pytest.raises(ValueError, match="held-out.jsonl:2: there is no reference: give `answers`.* Correct it.$"):
        HeldOutData([write(question("How many?"), question("How many?", None))], pair[1])


def test_data_that_is_given_twice_is_refused(pair, write):
    path = write(question("How many?"))
    with pytest.raises(ValueError, match="given twice"):
        HeldOutData([path, path], pair[1])


def test_an_empty_text_is_refused(pair, write):
    with pytest.raises(ValueError, match="contains no text: give a file with held-out text, such as plain prose"):
        HeldOutData([write("\n", name="text.txt")], pair[1])
    with pytest.raises(OSError, match="cannot be read .*: give a file with held-out text"):
        HeldOutData(["missing.txt"], pair[1])


def test_data_that_is_calibrated_on_is_remarked_on(pair, write, caplog):
    chats = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "4"}]} for n in "ab"]
    data = HeldOutData([write(*chats), write(WORDS, "Other text.", name="text.txt")], pair[1])
    with caplog.at_level(logging.WARNING):
        data.compare_with_calibration([write(chats[1], name="calibration.jsonl"), write(WORDS, name="more.txt")])
    assert "2 held-out samples or paragraphs are in the calibration data too" in data.remarks[0]
    assert "too kind" in caplog.text


ASKED = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Which?"}]


@pytest.mark.parametrize(
    ("content", "answer", "shared"),
    [
        (ASKED, "4", True),
        (ASKED, [{"type": "text", "text": "4"}], True),
        (ASKED, "four", True),
        ([ASKED[0], {"type": "text", "text": " Which? "}], "4", True),
        ([{"type": "image", "image": "copy.png"}, ASKED[1]], "4", True),
        ([{"type": "image", "image": "blue.png"}, ASKED[1]], "4", False),
        ([ASKED[1], ASKED[0]], "4", False),
        (ASKED[1:], "4", False),
        ([ASKED[0], {"type": "text", "text": "Who?"}], "4", False),
    ],
    ids=["same", "answer in parts", "another answer", "spaces", "another path", "another image", "image behind",
         "no image", "another question"],
)  # fmt: skip
def test_a_question_is_recognized_however_it_is_written_and_answered(write, tmp_path, content, answer, shared):
    (tmp_path / "copy.png").write_bytes((tmp_path / "red.png").read_bytes())
    Image.new("RGB", (48, 24), "blue").save(tmp_path / "blue.png")
    held_out = [EvaluationDataset(write(question("Which?", image=True), question("How many?")), skip_bad=None)]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    calibration = write({"messages": turns}, {"messages": turns}, name="calibration.jsonl")
    remarks = compare_with_calibration(held_out, (), [calibration, calibration])
    assert [remark[:19] for remark in remarks] == ["1 held-out samples "] * shared


def test_a_text_in_parts_is_the_text(write):
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Some."}]
    held_out = [EvaluationDataset(write(question("How many?")), skip_bad=None)]
    assert compare_with_calibration(held_out, (), [write({"messages": turns}, name="calibration.jsonl")])


def test_calibration_in_another_script_is_remarked_on(pair, write):
    data = HeldOutData([write(question("How many?"))], pair[1])
    data.compare_with_calibration([write("これは本です。今日は天気がいいです。", name="other.txt")])
    assert data.remarks == ["calibration data is mostly Chinese or Japanese, held-out data mostly Latin"]


def test_other_data_in_the_same_script_is_not(pair, write):
    data = HeldOutData([write(question("How many?"))], pair[1])
    data.compare_with_calibration([write(WORDS, name="calibration.txt")])
    assert data.remarks == []
