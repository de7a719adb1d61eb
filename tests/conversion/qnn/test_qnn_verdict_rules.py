"""The verdict on a bundle by its rules: what counts as measured, what fails, and what too few answers cannot tell.

Logits are made by hand here; those of real graphs are in `test_qnn_verdict.py`.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra `qnn`")

from conversion.qnn import verdict as module
from conversion.qnn.agreement import Agreement, agreement
from conversion.qnn.bundle.metadata import signed
from conversion.qnn.bundle.verdict_text import describe, what_loses_less
from conversion.qnn.verify import FLOAT, _report
from genieblue.data.chat_samples import ChatSample
from hub_cards.verdicts import verdict_problems

CONTEXT, VOCABULARY = 16, 50


def request(seed: int, image: bool = False, length: int = 12, answer: int = 4) -> dict:
    """A request whose last tokens are its answer."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length)
    labels = np.where(np.arange(length) < length - answer, -100, ids)
    return {"input_ids": ids, "labels": labels, **({"pixel_values": np.zeros((1, 3, 2, 2))} if image else {})}


def requests(count: int = 4, **options) -> list[dict]:
    """So many for each view."""
    return [request(seed, image, **options) for seed in range(count) for image in (False, True)]


def own_logits(ids: np.ndarray) -> np.ndarray:
    """(tokens, vocabulary), which expect the next token."""
    logits = np.random.default_rng(int(ids.sum())).normal(size=(len(ids), VOCABULARY)).astype(np.float32)
    logits[np.arange(len(ids) - 1), ids[1:]] += 4
    return logits


def answering(**differences):
    def score(difference):
        return {"task": "all", "first": 0.8, "second": 0.8 + difference, "difference": difference,
                "standard_error": 0.01, "count": 400}  # fmt: skip

    return lambda _model, _runner: {view: [score(difference)] for view, difference in differences.items()}


EQUAL = answering(text=0.0, multimodal=0.0)


@pytest.fixture
def judge(monkeypatch):
    """Judges a bundle whose logits are the model's after `change`, a function of logits and the request's number."""

    def judged(held_out, change=lambda logits, _number: logits, answers=EQUAL, **options):
        runner = SimpleNamespace(
            bundle=SimpleNamespace(metadata={"context_length": CONTEXT}), embed=lambda ids, _tiles: np.asarray(ids)
        )
        monkeypatch.setattr(module, "QnnRunner", lambda _folder: runner)
        monkeypatch.setattr(
            module,
            "bundle_logits",
            lambda _bundle, _view, embedded: [change(own_logits(ids), number) for number, ids in enumerate(embedded)],
        )
        monkeypatch.setattr(module, "_model_logits", lambda _model, _view, one: own_logits(one["input_ids"]))
        found = module.judge("model", "folder", held_out, answers, options.pop("accept_loss", False), **options)
        signed({"verdict": found})  # is JSON
        assert describe(found)
        return found

    return judged


def test_equal_logits_pass(judge):
    found = judge(requests())
    assert (found["result"], found["reasons"], found["remarks"]) == ("passed", [], [])
    assert {view: each["requests"] for view, each in found["logits"].items()} == {"text": 4, "multimodal": 4}


def test_equal_logits_do_not_show_that_answers_are_kept(judge):
    found = judge(requests(), answers=None)
    assert (found["result"], found["accepted"]) == ("not measured", True)
    assert found["reasons"] == ["answers were not compared: give held-out chats (--eval-data)"]
    assert judge(requests(), lambda logits, _: logits[:, ::-1], answers=None)["result"] == "failed"


def test_answers_beyond_the_context_are_not_measured(judge):
    found = judge(requests(length=30))
    assert found["result"] == "not measured" and found["logits"] == {}
    assert "4 held-out requests of the text view have no answer within 16 tokens" in found["reasons"][0]


def test_a_request_without_an_answer_counts_for_nothing_and_is_named(judge):
    found = judge([*requests(), request(9, length=30), request(8, image=True, answer=0)])
    assert found["result"] == "passed"
    assert {view: each["requests"] for view, each in found["logits"].items()} == {"text": 4, "multimodal": 4}
    assert [remark.split(" have ")[0] for remark in found["remarks"]] == [
        "1 held-out requests of the text view", "1 held-out requests of the multimodal view",
    ]  # fmt: skip


def test_logits_that_are_no_numbers_fail(judge):
    found = judge(requests(), lambda logits, _: logits * np.nan)
    assert (found["result"], found["accepted"]) == ("failed", False)
    assert "Infinity" not in json.dumps(found) and "NaN" not in json.dumps(found)


@pytest.mark.parametrize("few", [{"count": 1}, {"count": 3}, {"count": 4, "answer": 1}], ids=str)
def test_a_few_answers_that_agree_do_not_pass(judge, few):
    found = judge(requests(**few))
    assert found["result"] == "too few samples to tell"
    logits = found["logits"]["text"]
    assert found["reasons"][0] == (
        f"the text view was compared on {logits['tokens']} answered tokens of {logits['requests']} held-out requests; "
        "at least 8 tokens of 4 requests are needed: give more calibration chats"
    )
    assert len(found["reasons"]) == 2  # one for each view


def test_a_few_answers_that_are_ruined_fail_all_the_same(judge):
    found = judge(requests(1), lambda logits, _: logits[:, ::-1])
    assert found["result"] == "failed"
    (problem,) = verdict_problems({"verdict": found})
    assert "cosine" in problem and "are needed" not in problem


def test_one_wrong_number_fails_although_the_cosine_is_near_one(judge):
    def change(logits, number):
        logits[-2, 0] += 9.0 * (number == 0)
        return logits

    found = judge(requests(20), change)
    assert found["logits"]["text"]["cosine"] > module.SMALLEST_COSINE
    assert found["result"] == "failed" and "of their range, more than 25%" in found["reasons"][0]


def test_a_perplexity_counts_only_beyond_its_standard_error(judge):
    def colder(logits, number):
        return logits * (0.90 if number == 0 else 1.0)

    def hotter(logits, _number):
        return logits * 0.7

    assert judge(requests(), colder)["result"] == "passed"
    found = judge(requests(), hotter)
    assert found["result"] == "failed" and "the perplexity of the reference answers in the text" in found["reasons"][0]
    assert found["logits"]["text"]["perplexity"]["error"] > 0

    def unsure_once(logits, number):
        logits[np.arange(len(logits)), logits.argmax(-1)] -= 1.8 * (number == 0)
        return logits

    spread = judge(requests(), unsure_once)
    assert spread["result"] == "too few samples to tell" and "too near to 1.15" in spread["reasons"][0]


def test_answers_are_judged_by_view(judge):
    found = judge(requests(), answers=answering(text=0.0, multimodal=-0.05))  # 2.5 points over both
    assert found["result"] == "failed"
    assert found["reasons"] == ["the multimodal view's answers lose 5.0 ± 1.0 points, more than 3"]
    assert "answers of the multimodal view, all: 80.0% by the model, 75.0% by the bundle, of 400" in describe(found)


def test_a_view_without_answers_is_named(judge):
    found = judge(requests(), answers=answering(multimodal=0.0))
    assert found["result"] == "passed"
    assert found["reasons"] == [
        "the text view's answers were not measured: the data has no chat without images and no text"
    ]


def test_remarks_on_the_data_are_kept(judge):
    assert describe(judge(requests(), remarks=["it is too kind"]))[-1] == "verdict: passed; it is too kind"


def test_nothing_agrees_with_nothing():
    with pytest.raises(ValueError, match="no numbers to compare"):
        agreement(np.zeros((0, 5)), np.zeros((0, 5)))


@pytest.mark.parametrize(
    ("found", "ok"),
    [(Agreement(0.99, 0.1), True), (Agreement(0.97, 0.1), False), (Agreement(0.999, 0.5), False)],
    ids=str,
)
def test_verify_gates_cosine_and_error_of_an_output_against_float(found, ok):
    measured = {("part 0 text", "logits", FLOAT): [found], ("part 0 text", "key", FLOAT): [Agreement(0.5, 1.0)]}
    assert [check.ok for check in _report(measured, gates_float=True)] == [ok]
    assert [check.ok for check in _report(measured, gates_float=False)] == [True]


def test_a_question_that_is_there_twice_is_not_held_back_from_itself(tmp_path):
    from genieblue.cli.qnn import divide_chats

    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"the same image")

    def chat(number, name, answer, is_in_parts):
        content = [{"type": "text", "text": f"{number}?"}] if is_in_parts else f"{number}?"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return ChatSample(messages, [tmp_path / f"{name}.png"] * (number % 2), f"chats:{number}")

    chats = [chat(number, "a", "x", False) for number in range(20)]
    kept, held = divide_chats([*chats, *(chat(number, "b", "y", True) for number in range(20))], 64)
    assert len(kept) + len(held) == 20 and len(held) == 5
    assert {chat.messages[-1]["content"] for chat in (*kept, *held)} == {"x"}


@pytest.mark.parametrize(
    ("llm", "bits", "others", "ways"),
    [
        ("w4a16", 4.25, {}, "--llm mixed --bits-per-weight 5, then with --llm mixed --bits-per-weight 6, then"),
        ("w4a16", 4.125, {}, "--group-size 32, then with --llm mixed --bits-per-weight 5, then"),
        ("mixed", 4.997, {}, "--llm mixed --bits-per-weight 6, then"),
        ("mixed", 7.4, {}, "--llm w8a16"),
        ("w8a16", 8.0, {"cache_bits": 8}, "--cache-bits 16"),
        ("w8a16", 8.0, {}, "calibration chats that are more like"),
    ],
)
def test_after_a_failure_the_next_larger_formats_are_named_in_order(llm, bits, others, ways):
    facts = {"llm": llm, "bits_per_weight": bits, "cache_bits": 16, "embeddings": {"dtype": "uint16"}, **others}
    assert what_loses_less(facts).startswith(ways)
