"""The tasks of a lab: images that depend on seeds alone, answers that are right, held-out ones of other materials."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from genieblue.evaluation.samples import EvaluationDataset
from genieblue.lab.data import QUESTIONS, LabChats, fitting, held_out, read_texts, write_held_out
from genieblue.lab.tasks import TASKS, charts, counting, position, receipts
from genieblue.lab.tasks.drawn import TURNS
from genieblue.lab.tasks.materials import (
    COLOURS,
    HELD_OUT_FONTS,
    SYMBOLS,
    TRAINED_FONTS,
    font,
    scans,
    words,
)
from genieblue.lab.tasks.shapes import CELL
from modeling_genieblue import GenieBlueImageProcessor


def draw(task, seed=0, held=False):
    return TASKS[task](np.random.default_rng([9, seed]), held)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_image_and_questions_and_another_seed_others(task):
    first, again, other = draw(task), draw(task), draw(task, 1)
    assert first.asked == again.asked and first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("task", TASKS)
def test_images_fit_the_tiles_of_the_small_tower(task):
    processor = GenieBlueImageProcessor(tile_size=48)
    for seed in range(20):
        columns, rows = processor.select_grid(*draw(task, seed).image.size)
        assert columns * rows <= 16 and min(draw(task, seed).image.size) >= 10


def test_held_out_materials_are_never_trained_on():
    assert not set(words(False)) & set(words(True)) and len(words(True)) > 200
    assert not set(scans(False).indices) & set(scans(True).indices)
    assert not set(TRAINED_FONTS) & set(HELD_OUT_FONTS)


def test_every_symbol_is_drawn_and_has_a_name_of_its_own():
    drawn = font("DejaVuSans", 30)
    missing = bytes(drawn.getmask("\U0010fffe"))
    assert not [symbol for symbol in SYMBOLS if bytes(drawn.getmask(symbol)) == missing]
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


def test_the_name_of_a_symbol_is_one_of_four_choices():
    for seed in range(20):
        drawn = draw("naming", seed)
        assert len(set(drawn.choices)) == 4 and drawn.asked[0][1] in drawn.choices


def test_values_of_charts_are_different_and_those_of_a_pie_add_up():
    for seed in range(30):
        shares = charts._shares(np.random.default_rng(seed), 3)
        assert sum(shares) == 100 and len(set(shares)) == 3
        answers = dict(draw("charts", seed).asked)
        values = {question[-2]: int(value) for question, value in answers.items() if "value" in question}
        assert max(values, key=values.get) == answers["Which is the largest?"]
        assert min(values, key=values.get) == answers["Which is the smallest?"]


def test_shapes_are_counted_as_they_were_placed(monkeypatch):
    placed = []
    monkeypatch.setattr(counting, "draw_shapes", lambda shapes, *_: placed.append(shapes))
    for seed in range(20):
        asked = dict(draw("counting", seed).asked)
        shapes = list(placed[-1].values())
        counts = {f"How many {colour} {form}s are there?": shapes.count((colour, form)) for colour, form in shapes}
        (question,) = set(counts) & set(asked)
        assert asked[question] == str(counts[question]) and asked["How many shapes are there?"] == str(len(shapes))


def test_a_place_is_where_the_shape_was_drawn():
    for seed in range(20):
        drawn = draw("position", seed)
        question, answer = drawn.asked[0]
        colour = question.split()[3]
        row, column = answer.split()
        field = position.COLUMNS.index(column) * CELL, position.ROWS.index(row) * CELL
        pixels = np.asarray(drawn.image.crop((*field, field[0] + CELL, field[1] + CELL)))
        assert (pixels == COLOURS[colour]).all(axis=-1).sum() > 50


def test_prices_of_a_receipt_belong_to_its_things(monkeypatch):
    written = []

    class Pen:
        def text(self, place, text, *_, **__):
            written.append(text)

    monkeypatch.setattr(receipts.ImageDraw, "Draw", lambda _: Pen())
    drawn = draw("receipts", 3)
    pairs = dict(zip(written[::2], written[1::2], strict=True))
    assert {question[12:-1]: answer for question, answer in drawn.asked[:-2]} == pairs
    assert " ".join(written[:2]) == drawn.asked[-1][1]


def test_a_training_chat_has_one_image_and_several_turns():
    chat = draw("position", 2).chat(np.random.default_rng(0))
    images = [part for message in chat["messages"] if isinstance(message["content"], list)
              for part in message["content"] if part["type"] == "image"]  # fmt: skip
    assert len(images) == 1 and chat["messages"][0]["content"][0]["type"] == "image"
    assert 2 <= len(chat["messages"]) <= 2 * TURNS and chat["messages"][-1]["role"] == "assistant"


def test_training_data_is_equal_for_all_structures_of_a_seed_and_mixes_texts():
    texts = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]

    def chats(seed):
        return LabChats(dict.fromkeys(["digits", "position"]), texts, 0.3, 60, seed)

    kinds = [chat is texts[0] for chat in chats(0)]
    assert 8 < sum(kinds) < 30
    assert [str(each["messages"][-1]) for each in chats(0)] == [str(each["messages"][-1]) for each in chats(0)]
    assert [str(each["messages"][-1]) for each in chats(0)] != [str(each["messages"][-1]) for each in chats(1)]


def test_held_out_questions_are_files_that_an_evaluation_reads(tmp_path):
    write_held_out(tmp_path, dict.fromkeys(TASKS), 3)
    for name in TASKS:
        dataset = held_out(tmp_path, name, None, 3)
        assert isinstance(dataset, EvaluationDataset) and len(dataset) == 3
        assert {sample.task for sample in dataset} == {name} and all(sample.images for sample in dataset)
        assert (tmp_path / name / QUESTIONS).is_file()
    with pytest.raises(ValueError, match="has 3 questions, and `held_out` is 4"):
        held_out(tmp_path, "digits", None, 4)


def test_texts_are_read_from_questions_and_chats_and_what_is_neither_is_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"question": "2+2?", "answer": "It is <<2+2=4>>4."}) + "\n")
    assert read_texts([str(path)])[0]["messages"][1]["content"] == "It is 4."
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl: .* is no text to (learn|train on)"):
        read_texts([str(path)])
    assert len(read_texts(["english"])) > 50


def test_chats_without_images_are_texts_in_either_form(tmp_path):
    path, parts = tmp_path / "texts.jsonl", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chats = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}]},
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    expected = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert [text["messages"] for text in read_texts([str(path)])] == [expected] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": null, "answer": "a"}', "`question` is None, expected a text"),
        ('{"question": "a", "answer": " "}', "`answer` is ' ', expected a text"),
        ('{"question": "a", "answer":', "not valid JSON"),
        ('{"messages": "hello"}', "expected a list of turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ending with the assistant"),
        ('{"messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}], '
         '"images": ["a.png"]}', "the chat has an image"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, {"role": "assistant", '
         '"content": "b"}]}', "the chat has an image"),
    ],
    ids=["nothing asked", "nothing answered", "no JSON", "no turns", "no answer", "an image",
         "an image as a part"],
)  # fmt: skip
def test_a_wrong_line_of_texts_is_named(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "a", "answer": 4}\n' + line + "\n")
    with pytest.raises((ValueError, OSError), match=rf"texts.jsonl:2.*{message}"):
        read_texts([str(path)])


def test_texts_that_are_too_long_are_left_out_and_counted(caplog):
    class Words:
        def apply_chat_template(self, messages, tokenize):
            return " ".join(message["content"] for message in messages)

        def __call__(self, text, **_):
            return {"input_ids": text.split()}

    texts = [{"messages": [{"role": "user", "content": "a " * count}]} for count in (2, 9, 3)]
    with caplog.at_level("INFO"):
        assert fitting(texts, Words(), 5) == [texts[0], texts[2]]
    assert "Left out 1 of 3 texts" in caplog.text
    with pytest.raises(ValueError, match="All 3 texts have more than 1 tokens"):
        fitting(texts, Words(), 1)
