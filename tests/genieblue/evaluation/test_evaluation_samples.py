"""Evaluation data: references, choices, metrics and tasks of samples, and what is refused."""

import json

import pytest

from genieblue.evaluation.samples import EvaluationDataset, parse_sample

QUESTION = {"messages": [{"role": "user", "content": "How many?"}]}
CHAT = {"messages": [*QUESTION["messages"], {"role": "assistant", "content": "three"}]}


def parse(sample, metric=None):
    return parse_sample(sample, "data:1", None, metric)


def test_the_chats_own_answer_is_the_reference():
    sample = parse(CHAT)
    assert (sample.references, sample.metric, sample.question) == (("three",), "exact", "How many?")
    assert sample.prompt == QUESTION["messages"]


@pytest.mark.parametrize("chat", [CHAT, QUESTION], ids=["with an answer", "question only"])
def test_given_answers_are_the_references(chat):
    assert parse({**chat, "answers": ["3", "three", 3.0]}).references == ("3", "three", "3.0")
    assert parse({**chat, "answers": "3"}).references == ("3",)


def test_llava_turns_take_answers_too():
    sample = parse({"conversations": [{"from": "human", "value": "How many?"}], "answers": "3"})
    assert sample.references == ("3",) and sample.question == "How many?"


def test_a_samples_own_metric_wins_over_the_common_one():
    assert parse({**CHAT, "metric": "anls"}, "relaxed").metric == "anls"
    assert parse(CHAT, "relaxed").metric == "relaxed"
    assert parse({**CHAT, "choices": ["two", "three"]}).metric == "choice"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metric": "bleu"}, "data:1: The metric is 'bleu'"),
        ({"metric": "choice"}, "at least two different `choices`, found 0"),
        ({"choices": ["three", "three"]}, "found 1"),
        ({"choices": ["one", "two"]}, "'three' is not among the choices"),
        ({"answers": [{}, "x"]}, "'answers' is .*expected a text"),
        ({"messages": QUESTION["messages"]}, "there is no reference: give `answers`"),
        ({"messages": []}, "expected a list of turns"),
        ({"video": "a.mp4"}, "the key 'video'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_sample_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        parse({**CHAT, **change})


def test_a_file_without_good_samples_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({**CHAT, "metric": "bleu"}) + "\n")
    with pytest.raises(ValueError, match="data.jsonl:1"):
        EvaluationDataset(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        EvaluationDataset(tmp_path / "data.jsonl", skip_bad=True)


def test_the_first_samples_are_those_of_the_file():
    dataset = EvaluationDataset([{**CHAT, "answers": str(number)} for number in range(5)])
    assert [dataset.first(2)[place].references for place in range(2)] == [("0",), ("1",)]
    assert len(dataset.first(2)) == 2 and len(dataset.first(None)) == 5
