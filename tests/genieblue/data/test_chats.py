"""Training data: which chats are read, and which are refused with their place."""

import io
import json
import logging

import pytest
from chat_lines import IMAGE_TOKENS, good_line, llava_line, make_processor, picture, turn
from tiny_models import VOCABULARY, tiny_tokenizer

from conversion.chat_template import UnusableTemplate
from genieblue.data.calibration_chats import read_calibration, read_chats
from genieblue.data.chat_samples import parse_chat
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import SAMPLES, ChatCollator, EncodedChats
from modeling_genieblue import GenieBlueProcessor


def write_lines(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


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


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats"])
def test_chats_to_calibrate_on_are_chats_whatever_their_file_is_called(name, tmp_path):
    picture().save(tmp_path / "a.png")
    write_lines(tmp_path / name, llava_line("<image>\nWhat is it?", image="a.png"))
    found = read_calibration([tmp_path / name], make_processor(), count=4, length=4)
    assert len(found.multimodal) == 1


@pytest.mark.parametrize(("chats", "warned"), [(3, True), (4, False)])
def test_too_few_chats_with_images_to_calibrate_on_are_warned_of(chats, warned, tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    lines = [llava_line(f"<image>\nWhat is {number}?", image="a.png") for number in range(chats)]
    read_calibration([write_lines(tmp_path / "a.jsonl", *lines)], make_processor(), count=8, length=4)
    assert ("Only 3 of the calibration chats have images" in caplog.text) == warned


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
