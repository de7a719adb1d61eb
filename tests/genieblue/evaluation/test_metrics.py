"""Metrics of one answer, against values worked out by hand."""

import pytest

from genieblue.evaluation.metrics import METRICS, check_metric, standard_error

CASES = [
    ("exact", "a  cat\n", ["a cat"], 1),
    ("exact", "A cat", ["a cat"], 0),
    ("exact", "dog", ["cat", "dog"], 1),
    ("exact", "cafe\u0301", ["caf\u00e9"], 1),  # composed and decomposed
    ("contains", "It is a Cat.", ["cat"], 1),
    ("contains", "concatenate", ["cat"], 0),
    ("contains", "It shows 12 dogs", ["2"], 0),
    ("contains", "It is 3.5 m", ["3.5"], 1),
    ("contains", "It is 3.5 m", ["3"], 0),
    ("contains", "about -7", ["7"], 0),
    ("anls", "hello", ["hello"], 1),
    ("anls", "HELLO", ["hallo"], 0.8),  # one of five characters
    ("anls", "xyz", ["hello"], 0),  # below one half
    ("anls", "hallo", ["other", "hello"], 0.8),  # the best reference
    ("relaxed", "104", ["100"], 1),
    ("relaxed", "105.1", ["100"], 0),
    ("relaxed", "-96", ["-100"], 1),
    ("relaxed", "96", ["-100"], 0),
    ("relaxed", "1,040", ["1000"], 1),
    ("relaxed", "50 %", ["0.5"], 1),
    ("relaxed", "0", ["0"], 1),
    ("relaxed", "0.01", ["0"], 0),
    ("relaxed", "blue", ["Blue"], 1),
    ("relaxed", "nan", ["5"], 0),
]


@pytest.mark.parametrize("metric, answer, references, score", CASES, ids=lambda value: repr(value)[:30])
def test_scores_are_those_worked_out_by_hand(metric, answer, references, score):
    assert METRICS[metric](answer, references) == pytest.approx(score)


def test_an_empty_answer_scores_nothing():
    assert {name: score("", ["5", "word"]) for name, score in METRICS.items()} == dict.fromkeys(METRICS, 0)


def test_the_standard_error_is_that_of_the_sample_mean():
    assert standard_error([1, 0, 1, 1]) == pytest.approx(0.25)
    assert standard_error([1, 1, 1]) == 0
    assert standard_error([1]) is None


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'bleu': expected one of exact, contains, anls, relaxed, choice"):
        check_metric("bleu")
