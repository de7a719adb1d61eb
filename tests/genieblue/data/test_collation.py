"""Batches: labels are the tokens that generation makes and no others, images are those that a row shows."""

import numpy as np
import pytest
from chat_lines import CHAT_TEMPLATES, IMAGE_TOKENS, good_line, llava_line, make_processor, picture, turn
from tiny_models import EOS_ID, VOCABULARY, tiny_tokenizer

from genieblue.data.chat_samples import parse_chat
from genieblue.data.collation import IGNORED, ChatCollator
from modeling_genieblue import GenieBlueProcessor

TRAINED_TEXTS = {
    "newline-after-end": ["Two.</s>", "It is 7, not 1.</s>"],
    "spaces-around": [" Two.</s>", " It is 7, not 1.</s>"],
    "thought-before-last": ["<think>\n\n</think>\n\nTwo.</s>", "<think>\n\n</think>\n\nIt is 7, not 1.</s>"],
    "end-token-once": [" Two.\n</s>", " It is 7, not 1.\n</s>"],
}


def two_turns() -> list[dict]:
    image = {"type": "image", "image": picture()}
    return [
        turn("system", "Be brief."),
        turn("user", image, {"type": "image", "image": picture(24, 24)}, "How many?"),
        turn("assistant", "Two."),
        turn("user", "And this? ", image),
        turn("assistant", "It is 7, not 1."),
    ]


def trained_runs(processor, row) -> list[tuple[int, str]]:
    """(start, text) of each run of labels that are not ignored."""
    runs, ids = [], row["input_ids"]
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], ids, strict=True))
    for index, label in enumerate(row["labels"]):
        if label != IGNORED and (index == 0 or row["labels"][index - 1] == IGNORED):
            runs.append([index, []])
        if label != IGNORED:
            runs[-1][1].append(label)
    return [(start, processor.decode(run)) for start, run in runs]


def answers(processor, chat) -> list[tuple[list[int], str]]:
    """(ids before it, text) of each answer that is trained, in all rows of a chat."""
    return [
        (row["input_ids"][:start], text)
        for row in ChatCollator(processor).rows({"messages": chat})
        for start, text in trained_runs(processor, row)
    ]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_labels_are_the_answers_with_their_end_token_and_nothing_else(name):
    processor = make_processor(CHAT_TEMPLATES[name])
    assert [text for _, text in answers(processor, two_turns())] == TRAINED_TEXTS[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_precedes_an_answer_is_the_prompt_at_inference(name):
    processor = make_processor(CHAT_TEMPLATES[name])
    for (before, _), number in zip(answers(processor, two_turns()), (2, 4), strict=True):
        prompt = processor.apply_chat_template(two_turns()[:number], add_generation_prompt=True, tokenize=True)
        assert before == list(np.ravel(prompt))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_answer_that_repeats_the_question_is_labelled_where_it_is_the_answer(name):
    chat = [
        turn("user", "Two."),
        turn("assistant", "Two."),
        turn("user", "Two."),
        turn("assistant", "It is 7, not 1."),
    ]
    assert [text for _, text in answers(make_processor(CHAT_TEMPLATES[name]), chat)] == TRAINED_TEXTS[name]


def test_a_chat_is_one_row_where_the_template_writes_it_on_and_one_for_each_answer_where_it_does_not():
    lengths = {name: len(ChatCollator(make_processor(template)).rows({"messages": two_turns()}))
               for name, template in CHAT_TEMPLATES.items()}  # fmt: skip
    assert lengths == {"newline-after-end": 1, "spaces-around": 1, "thought-before-last": 2, "end-token-once": 2}


def test_a_row_shows_the_images_before_its_last_answer_and_no_others():
    rows = ChatCollator(make_processor(CHAT_TEMPLATES["thought-before-last"])).rows({"messages": two_turns()})
    assert [row["num_tiles"].tolist() for row in rows] == [[3, 1], [3, 1, 3]]
    assert [len(row["pixel_values"]) for row in rows] == [4, 7]
    assert [row["input_ids"].count(VOCABULARY) for row in rows] == [4 * IMAGE_TOKENS, 7 * IMAGE_TOKENS]


def test_ids_and_tiles_are_those_of_the_processor():
    processor = make_processor()
    row = ChatCollator(processor).encode({"messages": two_turns()})
    expected = processor.apply_chat_template(two_turns(), tokenize=True, return_dict=True, return_tensors="pt")
    ids = expected["input_ids"][0].tolist()
    assert row["input_ids"] == ids[: len(row["input_ids"])]
    assert processor.decode(ids[len(row["input_ids"]) :]) == "\n"  # behind the end token: never generated
    assert row["num_tiles"].tolist() == [3, 1, 3]
    assert row["pixel_values"].equal(expected["pixel_values"])


def test_stage_one_shows_one_tile_of_each_image():
    row = ChatCollator(make_processor(), max_tiles=1).encode({"messages": two_turns()})
    assert row["num_tiles"].tolist() == [1, 1, 1]
    assert row["input_ids"].count(VOCABULARY) == 3 * IMAGE_TOKENS


def test_text_only_chat_is_what_the_base_formats():
    processor = make_processor()
    row = ChatCollator(processor).encode(good_line())
    chat = good_line()["messages"]
    ids = processor.tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert row["input_ids"] == ids[: len(row["input_ids"])] and len(ids) - len(row["input_ids"]) == 1
    assert "pixel_values" not in row


def test_literal_placeholder_in_a_text_part_stays_text():
    processor = make_processor()
    chat = [turn("user", "What does <image> mean?"), turn("assistant", "A tag.")]
    row = ChatCollator(processor).encode({"messages": chat})
    assert "<image>" in processor.decode(row["input_ids"]) and VOCABULARY not in row["input_ids"]


def test_a_placeholder_in_messages_without_images_beside_them_is_text_and_in_llavas_form_an_image_that_is_missing():
    text = "What does <image> do?"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "A <image> shows."}]
    assert [message["content"] for message in parse_chat({"messages": chat}, "", None).messages][0] == text
    with pytest.raises(ValueError, match="1 placeholders .*for 0 images"):
        parse_chat(llava_line(text), "", None)


def test_a_literal_placeholder_beside_an_image_is_trained_as_text():
    processor = make_processor()
    question = turn("user", {"type": "image"}, "What does <image> mean?")
    row = ChatCollator(processor).encode(
        {"messages": [question, {"role": "assistant", "content": "A <image> tag."}], "images": [picture()]}
    )
    answer = processor.tokenizer("A <image> tag.</s>")["input_ids"]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert trained == answer and row["input_ids"].count(VOCABULARY) == len(row["pixel_values"]) * IMAGE_TOKENS
    assert "What does <image> mean?" in processor.decode(row["input_ids"])


def test_llava_conversations_are_read_like_messages():
    llava = {
        "image": [picture(), picture(24, 24)],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich one?"},
            {"from": "gpt", "value": "Both."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Why not."},
        ],
    }
    messages = [
        turn("user", {"type": "image"}, {"type": "image"}, "Which one?"),
        turn("assistant", "Both."),
        turn("user", "Why?"),
        turn("assistant", "Why not."),
    ]
    collator = ChatCollator(make_processor())
    first, second = collator.encode(llava), collator.encode({"messages": messages, "images": llava["image"]})
    assert first["input_ids"] == second["input_ids"] and first["labels"] == second["labels"]
    assert "<image>\n<image>\nWhich one?" in collator.processor.decode(first["input_ids"])


def test_batch_is_padded_on_the_right_and_padding_is_not_learned():
    collator = ChatCollator(make_processor())
    short, long = collator.encode(good_line()), collator.encode({"messages": two_turns()})
    batch = collator([good_line(), {"messages": two_turns()}])
    size, total = len(short["input_ids"]), len(long["input_ids"])
    assert batch["input_ids"].shape == (2, total)
    assert batch["input_ids"][0, :size].tolist() == short["input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [size, total]
    assert (batch["labels"][0, size:] == IGNORED).all() and batch["labels"][1].tolist() == long["labels"]
    assert batch["num_tiles"].tolist() == [3, 1, 3] and len(batch["pixel_values"]) == 7


def test_template_whose_prompt_is_not_how_the_conversation_goes_on_is_refused():
    # The prompt opens a thought, which the finished conversation does not show.
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    with pytest.raises(ValueError, match="not prefix-stable"):
        ChatCollator(make_processor(template)).encode({"messages": two_turns()})


def test_base_without_chat_template_uses_the_one_of_the_processor():
    tokenizer = tiny_tokenizer(chat_template=False)
    sizes = {"image_token_id": VOCABULARY, "image_seq_length": IMAGE_TOKENS, "tile_size": 24}
    template = CHAT_TEMPLATES["end-token-once"]
    row = ChatCollator(GenieBlueProcessor.from_base(tokenizer, chat_template=template, **sizes)).encode(good_line())
    assert [text for _, text in trained_runs(make_processor(), row)] == [" Seven.\n</s>"]
    with pytest.raises(ValueError, match="chat_template"):
        ChatCollator(GenieBlueProcessor.from_base(tokenizer, **sizes)).encode(good_line())


def test_long_chat_ends_with_the_last_answer_that_fits_as_a_whole(caplog):
    processor = make_processor()
    whole = ChatCollator(processor).encode({"messages": two_turns()})
    (_, _), (start, _) = trained_runs(processor, whole)
    cut = ChatCollator(processor, max_length=len(whole["input_ids"]) - 1).encode({"messages": two_turns()})
    assert cut["input_ids"] == whole["input_ids"][: len(cut["input_ids"])] and len(cut["input_ids"]) < start
    assert [text for _, text in trained_runs(processor, cut)] == ["Two.</s>"]
    assert cut["num_tiles"].tolist() == [3, 1] and len(cut["pixel_values"]) == 4
    assert "lose their last answers" in caplog.text


def test_first_answer_that_does_not_fit_with_its_end_token_is_refused():
    processor = make_processor()
    length = len(ChatCollator(processor).encode(good_line())["input_ids"])
    assert ChatCollator(processor, max_length=length).encode(good_line())["labels"][-1] == EOS_ID
    with pytest.raises(ValueError, match=f"{length} tokens, 0 of them for images.*raise `max_length`"):
        ChatCollator(processor, max_length=length - 1).encode(good_line())
