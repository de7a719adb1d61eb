"""Chats that ask the same: recognized in every form of text and image, and told from others."""

import base64

import pytest
from chat_lines import picture

from genieblue.data.chat_samples import ChatSample
from genieblue.data.chats import ChatDataset
from genieblue.data.same_prompts import prompt_of, shared_prompts


def chat(question, answer="So.", images=()) -> ChatSample:
    return ChatSample([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], images, "x")


IN_PARTS = [{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}]
SHOWN = [{"type": "image"}, {"type": "text", "text": "Why?"}]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (chat("Why so?"), chat(IN_PARTS, "Because."), True),
        (chat("Why so?"), chat("Why?"), False),
        (chat([{"type": "text", "text": "<image>\nWhy?"}]), chat(SHOWN, images=[b"a"]), False),
        (chat(SHOWN, images=[b"a"]), chat(SHOWN, images=[b"b"]), False),
        (chat(SHOWN, images=[picture()]), chat(SHOWN, images=[picture()]), True),
    ],
    ids=["in parts", "another", "image as text", "other bytes", "pixels"],
)
def test_what_is_the_same_prompt(one, other, same):
    assert (prompt_of(one) == prompt_of(other)) is same


def test_a_file_and_its_bytes_are_one_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"some bytes")
    assert prompt_of(chat(SHOWN, images=[tmp_path / "a.png"])) == prompt_of(chat(SHOWN, images=[b"some bytes"]))


def test_a_file_and_its_data_uri_are_one_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"some bytes")
    written = "data:image/png;base64," + base64.b64encode(b"some bytes").decode()
    asked, others = ([{"messages": chat(SHOWN).messages, "images": [image]}] for image in ("a.png", written))
    assert prompt_of(chat(SHOWN, images=[tmp_path / "a.png"])) == prompt_of(chat(SHOWN, images=[written]))
    assert prompt_of(chat(SHOWN, images=["data:image/png;base64,?"])) != prompt_of(chat(SHOWN, images=[written]))
    held_out = ChatDataset(asked, image_folder=tmp_path)
    assert shared_prompts([held_out], [ChatDataset(others)]) == shared_prompts([ChatDataset(others)], [held_out]) == 1


def test_each_held_out_sample_counts_once():
    asked = [{"messages": chat(f"{name}?").messages} for name in "aab"]
    others = [{"messages": chat([{"type": "text", "text": f"{name}?"}], "No.").messages} for name in "aac"]
    assert shared_prompts([ChatDataset(asked)], [ChatDataset(others), ChatDataset(others)]) == 2


def test_a_sample_has_one_hash_in_each_notation():
    found = [
        ChatDataset([{"messages": chat(question).messages}]).sample_hashes() for question in ("Why so?", IN_PARTS)
    ]
    assert found[0] == found[1] and len(found[0]) == 1
    assert found[0] != ChatDataset([{"messages": chat("Why so?", "No.").messages}]).sample_hashes()
