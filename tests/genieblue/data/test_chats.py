"""Training data: which chats are read and refused, and that labels are the generated tokens and no others."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image
from tiny_models import EOS_ID, VOCABULARY, tiny_tokenizer

from conversion.chat_template import UnusableTemplate
from genieblue.data.calibration_chats import read_chats
from genieblue.data.chat_samples import parse_chat
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import IGNORED, SAMPLES, ChatCollator, EncodedChats
from modeling_genieblue import GenieBlueProcessor

IMAGE_TOKENS = 4
CHAT_TEMPLATES = {
    # A newline follows the token that ends a turn, as in ChatML.
    "newline-after-end": None,
    "spaces-around": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'system' %}{{ m['content'] }}\n"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # Qwen3: an empty thought before the last answer, none before earlier ones.
    "thought-before-last": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "end-token-once": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}"
    ),
}
TRAINED_TEXTS = {
    "newline-after-end": ["Two.</s>", "It is 7, not 1.</s>"],
    "spaces-around": [" Two.</s>", " It is 7, not 1.</s>"],
    "thought-before-last": ["<think>\n\n</think>\n\nTwo.</s>", "<think>\n\n</think>\n\nIt is 7, not 1.</s>"],
    "end-token-once": [" Two.\n</s>", " It is 7, not 1.\n</s>"],
}


def make_processor(template: str | None = None, **options) -> GenieBlueProcessor:
    tokenizer = tiny_tokenizer(add_bos=template == CHAT_TEMPLATES["spaces-around"])
    if template is not None:
        tokenizer.chat_template = template
    sizes = {"image_token_id": VOCABULARY, "image_seq_length": IMAGE_TOKENS, "tile_size": 24, "max_tiles": 4}
    return GenieBlueProcessor.from_base(tokenizer, **sizes, **options)


def picture(width: int = 48, height: int = 24) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) % 251
    return Image.fromarray(pixels.astype(np.uint8))


def turn(role: str, *content) -> dict:
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def two_turns() -> list[dict]:
    image = {"type": "image", "image": picture()}
    return [
        turn("system", "Be brief."),
        turn("user", image, {"type": "image", "image": picture(24, 24)}, "How many?"),
        turn("assistant", "Two."),
        turn("user", "And this? ", image),
        turn("assistant", "It is 7, not 1."),
    ]


def write_lines(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def good_line(text: str = "Seven.", **more) -> dict:
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}], **more}


def llava_line(question: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}], **more}


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


# Files


def test_jsonl_is_read_by_line_with_image_paths_beside_it(tmp_path):
    (tmp_path / "scans").mkdir()
    picture().save(tmp_path / "scans" / "a.png")
    path = tmp_path / "chats.jsonl"
    llava = {
        "image": "scans/a.png",
        "conversations": [{"from": "human", "value": "<image>\nÄ?"}, {"from": "gpt", "value": "Ö."}],
    }
    text = "\ufeff" + json.dumps(good_line()) + "\r\n\r\n" + json.dumps(llava, ensure_ascii=False)
    path.write_bytes(text.encode())
    chats = ChatDataset(path)
    assert len(chats) == 2 and chats.where(1) == f"{path}:3"
    assert chats[1].images == [str(tmp_path / "scans" / "a.png")]
    assert chats[1].messages[0]["content"][1]["text"] == "Ä?"
    assert [chats.with_images().where(i) for i in range(len(chats.with_images()))] == [f"{path}:3"]


BAD_LINES = {
    "no JSON": ('{"messages": [', "not valid JSON"),
    "not UTF-8": ("\udcff", "not valid JSON"),
    "a list": ("[]", "expected JSONL, one object per line"),
    "no turns": ({"text": "Hello"}, "found the keys"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "the role is 'robot'"),
    "answer first": ({"messages": [{"role": "assistant", "content": "x"}]}, "the roles are assistant"),
    "question last": ({"messages": good_line()["messages"] + [{"role": "user", "content": "x"}]}, "ending with"),
    "twice the user": ({"messages": [{"role": "user", "content": "x"}] + good_line()["messages"]}, "in turn"),
    "empty answers": (good_line("  "), "all answers are empty"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "the content is None"),
    "image without placeholder": (good_line(images=["a.png"]), "0 placeholders"),
    "image part of an answer": (
        {"messages": [turn("user", "?"), turn("assistant", {"type": "image", "path": "a.png"}, "Look.")]},
        "expected images only in user turns",
    ),
    "more placeholders": (llava_line("<image><image>", image="a.png"), "2 placeholders.*for 1 images"),
    "missing image": (llava_line("<image>", image="none.png"), "the image file .* does not exist"),
    "address": (
        llava_line("<image>", image="https://us3r:pw@example.org/a.png?t=S"),
        "image https://example.org/a.png",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_with_file_and_number(name, tmp_path, caplog):
    line, reason = BAD_LINES[name]
    picture().save(tmp_path / "a.png")
    line = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "chats.jsonl"
    good = json.dumps(good_line())
    path.write_bytes(f"{good}\n\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"chats.jsonl:3.*{reason}.*skip_bad"):
        ChatDataset(path)
    with caplog.at_level(logging.WARNING):
        chats = ChatDataset(path, skip_bad=True)
    assert [chats.where(i) for i in range(len(chats))] == [f"{path}:1", f"{path}:4"]
    assert chats.num_skipped == 1
    assert any("chats.jsonl:3" in message for message in caplog.messages)
    assert "Skipping 1 of 3 samples" in caplog.text


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "linked folder"])
def test_image_outside_of_the_folder_is_refused(way, tmp_path):
    picture().save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    name = {
        "dots": "../secret.png",
        "absolute": str(tmp_path / "secret.png"),
        "link": "link.png",
        "linked folder": "up/secret.png",
    }[way]
    chat = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
    path = write_lines(folder / "chats.jsonl", good_line(), {"messages": chat, "images": [name]})
    with pytest.raises(ValueError, match=r"chats.jsonl:2: the image .* is outside"):
        ChatDataset(path)
    assert len(ChatDataset(path, image_folder=tmp_path, skip_bad=True)) == (2 if way == "absolute" else 1)


def image_line(name: str) -> dict:
    chat = [{"role": "user", "content": f"<image>\nWhat is {name}?"}, {"role": "assistant", "content": name}]
    return {"messages": chat, "images": [name]}


def test_broken_image_is_an_error_or_replaced_by_the_next_sample(tmp_path, caplog):
    picture().save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    path = write_lines(tmp_path / "chats.jsonl", image_line("good.png"), image_line("broken.png"), good_line())
    collator = ChatCollator(make_processor())
    with pytest.raises(ValueError, match=r"chats.jsonl:2: .*broken.png.*skip_bad"):
        EncodedChats(ChatDataset(path), collator)[1]
    rows = EncodedChats(ChatDataset(path, skip_bad=True), collator)
    with caplog.at_level(logging.WARNING):
        expected = [{**row, SAMPLES: [f"{path}:3"]} for row in collator.rows(good_line())]
        assert rows[1] == rows[2] == expected
    assert "chats.jsonl:2" in caplog.text and "1 so far" in caplog.text


def test_a_data_set_of_nothing_but_bad_samples_is_an_error(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"none")
    path = write_lines(tmp_path / "chats.jsonl", image_line("broken.png"), image_line("broken.png"))
    with pytest.raises(ValueError, match="All 2 samples are bad"):
        EncodedChats(ChatDataset(path, skip_bad=True), ChatCollator(make_processor()))[0]


@pytest.mark.parametrize("decode", [True, False])
def test_datasets_with_an_image_column_are_read(decode):
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    rows = [image_line("a") | {"images": [{"bytes": buffer.getvalue(), "path": None}]}, good_line(images=[])]
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "images": datasets.List(datasets.Image(decode=decode)),
    }
    chats = ChatDataset(datasets.Dataset.from_list(rows, features=datasets.Features(features)))
    collator = ChatCollator(make_processor())
    assert len(chats) == 2
    assert collator([chats[0], chats[1]])["num_tiles"].tolist() == [3]


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + no_token }}", "{% for m in %}"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_broken_template_is_no_bad_sample(tmp_path, caplog, template, skip_bad):
    path = write_lines(tmp_path / "chats.jsonl", good_line(), good_line())
    rows = EncodedChats(ChatDataset(path, skip_bad=skip_bad), ChatCollator(make_processor(template)))
    with pytest.raises(UnusableTemplate, match="^The model's chat template fails .*correct the template.$"):
        rows[0]
    assert not caplog.messages


def test_a_chat_that_the_template_itself_refuses_is_a_bad_sample(tmp_path):
    template = "{% if messages | length > 2 %}{{ raise_exception('two turns at most') }}{% endif %}"
    processor = make_processor(template + make_processor().chat_template)
    long = {"messages": 2 * good_line()["messages"]}
    path = write_lines(tmp_path / "chats.jsonl", long, good_line())
    with pytest.raises(ValueError, match="chats.jsonl:1: the chat template rejects this chat: two turns.*skip_bad"):
        EncodedChats(ChatDataset(path), ChatCollator(processor))[0]
    rows = EncodedChats(ChatDataset(path, skip_bad=True), ChatCollator(processor))
    assert rows[0] == rows[1]


def test_a_model_without_a_template_is_told_without_blaming_a_sample(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=False)
    sizes = {"image_token_id": VOCABULARY, "image_seq_length": IMAGE_TOKENS, "tile_size": 24}
    with pytest.raises(UnusableTemplate, match="^This model has no chat template.*--chat-template"):
        EncodedChats(ChatDataset([good_line()]), ChatCollator(GenieBlueProcessor.from_base(tokenizer, **sizes)))[0]


def test_data_of_which_nothing_may_be_left_out_is_not_offered_that(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", good_line("  "))
    for read in (lambda: ChatDataset(path, skip_bad=None), lambda: read_chats(path, 4)):
        with pytest.raises(ValueError, match="chats.jsonl:1: all answers are empty.* Correct it.$"):
            read()


def test_samples_that_are_made_when_asked_for_are_not_made_before():
    class Maker:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.made = index
            return good_line() if index else {"messages": []}

    maker = Maker()
    chats = ChatDataset(maker)
    assert not hasattr(maker, "made") and chats[2].messages[1]["role"] == "assistant"
    with pytest.raises(ValueError, match="sample 0: expected a list of turns"):
        EncodedChats(chats, ChatCollator(make_processor()))[0]


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ChatDataset(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="was not saved by `datasets` and contains no data"):
        ChatDataset(tmp_path)
    with pytest.raises(ValueError, match="give one split"):
        ChatDataset({"train": [good_line()]})
    with pytest.raises(OSError, match="is not a folder"):
        ChatDataset([good_line()], image_folder=tmp_path / "none")
    with pytest.raises(ValueError, match="`image_folder`"):
        parse_chat(image_line("a.png"), "here", None)


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": ' + "[" * 100_000,
        '{"messages": [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
        '{"image": "a\\u0000.png", "messages": [{"role": "user", "content": "<image>"}, '
        '{"role": "assistant", "content": "b"}]}',
    ],
    ids=["deep", "role", "surrogate", "null byte"],
)
def test_mangled_lines_are_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="data.jsonl:1: "):
        ChatDataset(path)


def test_a_path_in_the_place_of_bytes_does_not_leave_the_folder(tmp_path):
    path = tmp_path / "data" / "data.jsonl"
    path.parent.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    for content in (str(tmp_path / "secret.png"), [str(tmp_path / "secret.png")], "http://127.0.0.1:1/x.png"):
        part = {"type": "image", "image": {"bytes": content}}
        messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}]
        path.write_text(json.dumps({"messages": messages}) + "\n")
        with pytest.raises(ValueError, match="data.jsonl:1: "):
            ChatDataset(path)
