"""Held-out chats for a bundle's verdict: what is refused or remarked on, and which of them logits are read of."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_quantized import large_pair, with_processor

from genieblue.evaluation import qnn_held_out
from genieblue.evaluation.evaluate import Evaluation, ScoredAnswer
from genieblue.evaluation.qnn_held_out import BundleHeldOut
from modeling_genieblue import GenieBlueProcessor


def write_chats(path: Path, *questions: str, image: str | None = None) -> Path:
    rows = [{"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": "x"}],
             **({"images": [image]} if image else {})} for each in questions]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chats_that_are_calibrated_on_too_or_in_another_script_are_remarked_on(tmp_path):
    english = write_chats(tmp_path / "a.jsonl", "Which colour is it?", "How many are there?")
    japanese = write_chats(tmp_path / "b.jsonl", "これは何ですか。今日は天気がいいです。")
    other = write_chats(tmp_path / "c.jsonl", "Another question?")
    data = BundleHeldOut([english])
    assert data.compare_with_calibration(other, None) == []
    (remark,) = data.compare_with_calibration(english, None)
    assert remark.startswith("2 held-out samples or paragraphs are in the calibration data too")
    (remark,) = data.compare_with_calibration(japanese, None)
    assert remark == "calibration data is mostly Chinese or Japanese, held-out data mostly Latin"


def test_a_bad_held_out_chat_offers_no_option_that_is_not_there(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="Correct it") as error:
        BundleHeldOut([tmp_path / "bad.jsonl"])
    assert "--skip-bad" not in str(error.value)


def test_a_plain_text_is_refused_by_name(tmp_path):
    (tmp_path / "text.txt").write_text("Some text.")
    with pytest.raises(ValueError, match=r"text\.txt is a text, but a bundle is compared on chats"):
        BundleHeldOut([write_chats(tmp_path / "a.jsonl", "Why?"), str(tmp_path / "text.txt")])


def test_logits_are_read_of_the_first_chats_of_each_view_in_all_files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    texts = write_chats(tmp_path / "a.jsonl", *(f"Question {number}?" for number in range(4)))
    images = write_chats(tmp_path / "b.jsonl", *(f"<image>What {number}?" for number in range(3)), image="a.png")
    processor = GenieBlueProcessor.from_pretrained(with_processor(large_pair()))
    found = list(BundleHeldOut([texts, images]).requests(processor, 2))
    assert ["pixel_values" in each for each in found] == [False, False, True, True]
    assert all(set(each["labels"]) != {-100} for each in found)


@pytest.fixture(scope="module")
def processor():
    return GenieBlueProcessor.from_pretrained(with_processor(large_pair()))


def test_chats_that_are_longer_than_the_context_are_named(tmp_path, processor):
    path = write_chats(tmp_path / "a.jsonl", "Why?", *["Why is it what it is? " * 20] * 7)
    data, stops = BundleHeldOut([path]), [processor.tokenizer.eos_token_id]
    data.check(processor, 1000, stops)
    told = r"longer than the context of 64 .*a\.jsonl:2 \(\d+ tokens\), .* and 2 more\. Shorten.*--context-length"
    with pytest.raises(ValueError, match=told) as error:
        data.check(processor, 64, stops)
    assert "jsonl:1 " not in str(error.value)


def test_a_choice_is_read_with_its_prompt(tmp_path, processor):
    chat = {"messages": [{"role": "user", "content": "Why?"}], "answers": "so", "choices": ["so", "and so on " * 30]}
    (tmp_path / "a.jsonl").write_text(json.dumps(chat) + "\n")
    data, stops = BundleHeldOut([tmp_path / "a.jsonl"]), [processor.tokenizer.eos_token_id]
    data.check(processor, 1000, stops)
    with pytest.raises(ValueError, match=r"a\.jsonl:1 \(\d+ tokens\)"):
        data.check(processor, 64, stops)


def test_an_image_that_cannot_be_read_is_named_with_its_chat(tmp_path, processor):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])  # its size can be read
    data = BundleHeldOut([write_chats(tmp_path / "a.jsonl", "<image>What?", image="a.png")])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*image"):
        data.check(processor, 1000, [processor.tokenizer.eos_token_id])


def test_answers_of_all_files_are_paired_by_view(tmp_path, monkeypatch):
    files = [write_chats(tmp_path / f"{name}.jsonl", "One?", "Two?") for name in "ab"]

    def answered(answerer, chats):
        return Evaluation(
            [ScoredAnswer(chats[place].where, "all", "exact", "text", "?", ("x",), "x", score)
             for place, score in enumerate((1.0, answerer))]
        )  # fmt: skip

    monkeypatch.setattr(qnn_held_out, "ModelAnswerer", lambda model, processor: 1.0)
    monkeypatch.setattr(qnn_held_out, "BundleAnswerer", lambda runner: 0.0)
    monkeypatch.setattr(qnn_held_out, "evaluate", answered)
    found = BundleHeldOut(files).answers(None, SimpleNamespace(processor=None))
    assert list(found) == ["text"]
    total = found["text"][0]
    assert (total["count"], total["first"], total["second"], total["worse"]) == (4, 1.0, 0.5, 2)
