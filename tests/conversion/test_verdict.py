"""The verdict: what fails, what passes, and what too few samples cannot tell."""

import math

import pytest

from conversion.verdict import Limits, judge, nothing_measured, of_text_view, perplexity_change, with_problems
from genieblue.evaluation.metrics import standard_error
from hub_cards.verdicts import (
    FAILED,
    PASSED,
    PLAIN_TEXT,
    REFERENCES,
    UNDECIDED,
    UNKNOWN,
    measurement_rows,
    summary,
    verdict_problems,
)


def answers(kept: int, lost: int, wrong: int = 0) -> list[dict]:
    """The difference of two models over samples that both answer, only the first, or none of them."""
    differences = [0.0] * (kept + wrong) + [-1.0] * lost
    count = len(differences)
    first, change = (kept + lost) / count, -lost / count
    return [{"task": "all", "metric": "exact", "first": first, "second": first + change, "difference": change,
             "standard_error": standard_error(differences), "better": 0, "worse": lost, "count": count}]  # fmt: skip


def change(factor: float, samples: int = 50, spread: float = 0.1) -> dict:
    """Perplexity times `factor`, with `spread` between the losses of samples of 10 tokens."""
    before = [(20.0, 10)] * samples
    after = [(20.0 + 10 * (math.log(factor) + spread * (-1) ** number), 10) for number in range(samples)]
    return perplexity_change("plain text", before, after)


def verdict(answered: list | None = None, *changes: dict, view: str = "multimodal", **options) -> dict:
    views = {view: {"answers": answered or [], "perplexity": list(changes)}}
    return judge(views, options.pop("limits", Limits()), options.pop("accept_loss", False), **options)


@pytest.mark.parametrize(
    "kept, lost, expected",
    [(75, 25, FAILED), (99, 1, PASSED), (100, 0, PASSED), (96, 4, UNDECIDED), (90, 10, FAILED), (38, 2, UNDECIDED)],
)
def test_a_loss_counts_only_beyond_its_standard_error(kept, lost, expected):
    assert verdict(answers(kept, lost))["result"] == expected


@pytest.mark.parametrize("kept, lost", [(1, 0), (0, 1), (20, 0)])
def test_few_samples_that_agree_prove_nothing(kept, lost):
    found = verdict(answers(kept, lost))
    assert found["result"] == UNDECIDED and "lose -0.0" not in found["reasons"][0]


def test_a_few_samples_that_all_turn_wrong_do():
    assert verdict(answers(0, 4))["result"] == FAILED


def test_a_model_that_answers_nothing_in_16_bits_has_nothing_to_lose():
    found = verdict(answers(0, 0, wrong=200))
    assert found["result"] == UNDECIDED and "cannot lose more than 3 points" in found["reasons"][0]


@pytest.mark.parametrize("factor, expected", [(1.0, PASSED), (1.13, PASSED), (1.15, UNDECIDED), (1.2, FAILED)])
def test_a_perplexity_counts_only_beyond_its_standard_error(factor, expected):
    assert verdict(None, change(factor))["result"] == expected


def test_the_error_of_a_perplexity_is_paired_by_sample():
    many, few = change(1.1, samples=400), change(1.1, samples=4)
    assert many["ratio"] == pytest.approx(1.1) == few["ratio"]
    assert many["error"] == pytest.approx(0.1 / 20, rel=0.01) and few["error"] > 5 * many["error"]
    assert change(1.1, spread=0.0)["error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("factor, samples", [(0.9, 1), (2.0, 1), (0.9, 2), (1.0, 3)])
def test_a_few_stretches_of_text_cannot_pass(factor, samples):
    found = verdict(None, change(factor, samples=samples, spread=0.0))
    assert found["result"] == UNDECIDED
    assert f"from {samples} sample{'s' * (samples > 1)}: at least 4 are needed" in found["reasons"][0]
    assert verdict(None, change(factor, samples=4, spread=0.0))["result"] == (FAILED if factor > 1 else PASSED)


def test_a_few_stretches_of_ruined_text_fail():
    assert verdict(None, change(2.0, samples=2, spread=0.0))["result"] == FAILED


def test_a_wide_limit_does_not_make_a_few_answers_enough():
    assert verdict(answers(3, 0), limits=Limits(answer_loss=50))["result"] == UNDECIDED
    assert verdict(answers(4, 0), limits=Limits(answer_loss=50))["result"] == PASSED


def test_losses_that_are_no_numbers_fail():
    found = verdict(None, perplexity_change("plain text", [(1.0, 2)] * 9, [(math.nan, 2)] * 9))
    assert found["result"] == FAILED and math.isfinite(found["views"]["multimodal"]["perplexity"][0]["ratio"])


def test_losses_far_beyond_all_limits_fail():
    before, after = [(1.0, 1)] * 4, [(1.0, 1), (1.0, 1), (1e5, 1), (1e6, 1)]
    assert verdict(None, perplexity_change("plain text", before, after))["result"] == UNDECIDED
    assert verdict(None, perplexity_change("plain text", before, [(1e5, 1)] * 4))["result"] == FAILED
    assert verdict(None, perplexity_change("plain text", [(1e5, 1)] * 4, before))["result"] == PASSED


def test_one_failure_decides():
    assert verdict(answers(100, 0), change(1.0), change(2.0))["result"] == FAILED


def test_an_accepted_failure_stays_one():
    found = verdict(answers(50, 50), accept_loss=True)
    assert (found["result"], found["accepted"]) == (FAILED, True)
    assert summary(found).startswith("failed, accepted; the multimodal view's answers lose 50.0 ± 5.0 points")
    assert not verdict(answers(50, 50))["accepted"]


def test_a_refusal_names_only_what_failed():
    found = verdict(answers(50, 50), change(1.15))
    assert len(found["reasons"]) == 3 and "too near to 1.15" in found["reasons"][1]
    (problem,) = verdict_problems({"verdict": found})
    assert problem.startswith("Quantization costs too much: the multimodal view's answers lose 50.0 ± 5.0 points, ")
    assert "too near" not in problem and "not measured" not in problem
    (problem,) = verdict_problems({"verdict": with_problems(found, ["the logits are unrelated"], False)})
    assert "the logits are unrelated; the multimodal view's answers lose" in problem


def test_a_refusal_for_a_verdict_of_an_earlier_version_names_all_its_reasons():
    (problem,) = verdict_problems({"verdict": {"result": "failed", "accepted": False, "reasons": ["one", "two"]}})
    assert problem.startswith("Quantization costs too much: one; two. ")


def test_a_view_without_samples_is_named():
    (reason,) = verdict(answers(100, 0))["reasons"]
    assert reason == "the text view was not measured: the data has no chat without images and no text"


def test_remarks_about_the_data_are_kept():
    assert summary(verdict(answers(100, 0), remarks=["it is too kind"])).endswith("; it is too kind")


def test_limits_are_settings():
    assert verdict(answers(75, 25), limits=Limits(answer_loss=40))["result"] == PASSED
    assert verdict(None, change(1.13), limits=Limits(perplexity_ratio=1.05))["result"] == FAILED


@pytest.mark.parametrize("limits", [{"answer_loss": -1}, {"answer_loss": math.nan}, {"answer_loss": 101},
                                    {"perplexity_ratio": 0.9}, {"perplexity_ratio": math.nan},
                                    {"perplexity_ratio": math.inf}])  # fmt: skip
def test_limits_that_cannot_be_ones_are_refused(limits):
    with pytest.raises(ValueError, match="--max-"):
        Limits(**limits)


def test_without_data_nothing_is_measured():
    assert nothing_measured()["result"] == UNKNOWN and nothing_measured()["accepted"]
    assert judge({}, Limits(), False)["result"] == UNKNOWN


@pytest.mark.parametrize("accept_loss", [False, True])
def test_problems_fail_whatever_was_measured_and_are_accepted_like_a_loss(accept_loss):
    found = with_problems(nothing_measured(), ["the logits are unrelated"], accept_loss)
    assert (found["result"], found["accepted"], found["reasons"][0]) == (
        FAILED,
        accept_loss,
        "the logits are unrelated",
    )
    assert with_problems(nothing_measured(), [], accept_loss) == nothing_measured()


def test_a_base_is_judged_by_its_text_view_only():
    views = {"text": {"answers": [], "perplexity": [change(1.0)]},
             "multimodal": {"answers": answers(50, 50), "perplexity": []}}  # fmt: skip
    own = of_text_view(judge(views, Limits(), False, remarks=["it is too kind"]) | {"data": []})
    assert (own["result"], own["accepted"], own["reasons"], own["remarks"]) == (PASSED, True, [], ["it is too kind"])
    assert list(own["views"]) == ["text"]
    views["text"], views["multimodal"] = views["multimodal"], views["text"]
    assert of_text_view(judge(views, Limits(), False) | {"data": []})["accepted"] is False
    assert of_text_view(nothing_measured()) == nothing_measured()


def test_rows_for_the_card_have_both_scores():
    found = verdict(answers(75, 25), change(1.2)) | {
        "data": [{"name": "held-out.jsonl", "of": REFERENCES}, {"name": "text.md", "of": PLAIN_TEXT}]
    }  # fmt: skip
    rows = measurement_rows(found)
    assert (
        rows[0]["value"].startswith("75.0 %, in 16 bits 100.0 % (-25.0 ± ")
        and " of held-out.jsonl, greedy" in rows[0]["how"]
    )
    assert "(1.200 times)" in rows[1]["value"] and rows[1]["how"].endswith(" of text.md")
