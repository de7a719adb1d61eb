"""The parts of the demo on a real LLM: questions and words."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from genieblue.demo import smollm2
from genieblue.lab.scans import split_scans


@pytest.fixture(scope="module")
def scans():
    return split_scans()


@pytest.fixture
def demo(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "none.gguf")
    made = smollm2.SmolLM2Demo(scale=0.1)
    made._train_words, made._held_out_words = ["CAT", "HORSE"], ["MOUSE", "DOG"]
    return made


# Questions


def test_held_out_words_are_never_trained_on_and_are_real_words():
    vocabulary = {f"Ġ{word}": 0 for word in ("python", "object", "class", "zzzqq", "method", "a", "toolongtobeone")}
    vocabulary |= {f"Ġ{word}": 0 for word in smollm2.split_words.__doc__.lower().split() if word.isalpha()}
    import pydoc_data.topics

    text = " ".join(pydoc_data.topics.topics.values()).split()
    vocabulary |= {f"Ġ{word}": 0 for word in text if word.isalpha() and word.islower()}
    trained, held_out = smollm2.split_words(vocabulary, seed=0)
    assert len(held_out) == smollm2.HELD_OUT_WORDS and not set(trained) & set(held_out)
    assert "ZZZQQ" in trained and "ZZZQQ" not in held_out
    assert all(3 <= len(word) <= 7 and set(word) <= set(smollm2.CHARACTERS) for word in trained + held_out)


def test_a_chat_asks_several_questions_about_one_drawing(demo):
    chats = demo.training_data(2)
    for index in range(20):
        messages = chats[index]["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * smollm2.TURNS
        kinds = [part["type"] for message in messages[::2] for part in message["content"]]
        assert kinds == ["image"] + ["text"] * smollm2.TURNS
    assert chats[3]["messages"][1] == chats[3]["messages"][1]
    assert str(chats[3]["messages"][1:]) == str(demo.training_data(2)[3]["messages"][1:])


def test_held_out_answers_are_right_and_tasks_alternate(demo):
    readings = demo.held_out()
    assert [reading.task for reading in readings[: len(smollm2.QUESTIONS)]] == list(smollm2.QUESTIONS)
    assert len(readings) == sum(-(-count // 10) for count in smollm2.ASKED.values())
    for reading in readings:
        assert reading.question == smollm2.QUESTIONS[reading.task]
        if reading.task in ("word", "spelled"):
            assert reading.answer.replace(" ", "") in ("MOUSE", "DOG")
            assert (" " in reading.answer) == (reading.task == "spelled")
        else:
            assert reading.answer.isdigit()


def test_the_larger_number_is_larger(demo):
    for seed in range(30):
        _, answers = demo._ask("larger", np.random.default_rng(seed))
        larger, smaller, both = answers.values()
        assert int(larger) > int(smaller)
        assert both in (f"{larger} and {smaller}", f"{smaller} and {larger}")
