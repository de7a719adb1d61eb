"""What a sample says beyond its messages: read, refused by name, or known to say nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from genieblue.data.chat_samples import parse_chat
from genieblue.data.chats import ChatDataset

QUESTION, ANSWER = "Which colour is it?", "It is blue."


def sample(**more) -> dict:
    return {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}], **more}


def with_turn(number: int, **more) -> dict:
    changed = sample()
    changed["messages"][number].update(more)
    return changed


def with_part(**part) -> dict:
    return with_turn(0, content=[{"type": "image", "image": Image.new("RGB", (4, 4)), **part}])


LOST = {
    "a video": sample(video="clip.mp4"),
    "videos": sample(videos=["clip.mp4"]),
    "an address of a video": sample(video_url="https://example.org/clip"),
    "audio": sample(audio={"path": "a.wav", "bytes": None}),
    "tools": sample(tools=[{"name": "search"}]),
    "tools as a string": sample(tools='[{"name": "search"}]'),
    "documents": sample(documents=[{"text": "Blue."}]),
    "another answer": sample(answer="Red."),
    "a preference": sample(chosen=ANSWER, rejected="It is red."),
    "an answer that is not wanted": sample(label=False),
    "a weight": sample(weight=0.5),
    "a mask": sample(mask=[0, 1]),
    "a depth image": sample(depth=np.zeros((2, 2))),
    "an image under another name": sample(picture="a.png"),
    "a file under an unknown name": sample(scan="a.png"),
    "an address of an image": sample(image_url="https://example.org/a"),
    "a thought": sample(reasoning="The sky is."),
    "a text under an unknown name": sample(hint="look at the sky"),
    "a structure under an unknown name": sample(scene={"sky": "blue"}),
    "another answer in a word": sample(solution="red"),
    "a target in a word": sample(target="red"),
    "a class": sample(label="red"),
    "a persona in a word": sample(persona="pirate"),
    "a reason in a word": sample(rationale="sky"),
    "a weight under another name": sample(sample_weight=0),
    "a request to leave it out": sample(skip=True),
    "a request to train on prompts": sample(train_on_input=True),
    "a box of an image": sample(images=[{"path": "a.png", "bbox": [0, 0, 1, 1]}])
    | {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ANSWER}]},
    "calls of tools": with_turn(1, tool_calls=[{"function": {"name": "search"}}]),
    "a thought of a turn": with_turn(1, reasoning_content="The sky is."),
    "a weight of a turn": with_turn(1, weight=0),
    "a turn that is not trained": with_turn(1, train=False),
    "a speaker": with_turn(0, name="Ann"),
    "an image of a turn": with_turn(0, image="a.png"),
    "a size to resize to": with_part(resized_height=280),
    "a box": with_part(bbox=[0, 0, 1, 1]),
    "a detail": with_part(detail="high"),
    "two images in a part": with_part(path="a.png"),
    "both forms": sample(conversations=[{"from": "human", "value": "Hello"}]),
}


@pytest.mark.parametrize("name", LOST)
def test_a_key_that_may_carry_meaning_is_refused_by_name(name):
    with pytest.raises(ValueError, match="^sample 1[:,].*(would be lost|expected (only )?one of)"):
        ChatDataset([sample(), LOST[name]])


HARMLESS = {
    "ids": {"id": 7, "idx": 0, "question_id": "q-7", "image_id": "coco/7", "_id": {"$oid": "5f"}},
    "origin": {"source": "Visual Genome", "dataset": "coco", "split": "train", "coco_url": "http://x/y z.png"},
    "a kind": {"task": "a long question", "category": "outdoor scenes", "question_type": "yes or no", "tags": ["a b"]},
    "a licence": {"license": {"name": "CC BY 4.0", "url": "https://example.org"}, "flickr_url": "https://example.org"},
    "numbers": {"score": 0.5, "width": 640, "image_size": [640, 480], "num_images": 1, "quality": {"sharp": 1}},
    "unknown numbers": {"clarity": 0.3, "done": True},
    "an unknown word": {"track": "outdoor"},
    "metadata": {"metadata": {"task_instruction": "Look."}},
    "nothing": {"video": None, "tools": [], "system": "", "audio": {"path": None, "bytes": None}, "image": ""},
    "what the messages say": {"prompt": QUESTION, "caption": "blue", "options": ["It", "is blue"]},
    "what is done anyway": {"weight": 1, "label": True},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_describes_a_sample_passes(name):
    parsed = parse_chat(sample(**HARMLESS[name]), "here", None)
    assert [message["content"] for message in parsed.messages] == [QUESTION, ANSWER]


def test_what_only_describes_a_turn_or_a_part_passes():
    parse_chat(with_turn(1, weight=1, id="m-1", timestamp=3, tool_calls=None, model="x"), "here", None)
    parse_chat(with_part(text=None, detail="auto", width=4, id=3), "here", None)


def test_names_of_an_image_that_is_there_pass():
    rows = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    raw = with_turn(0, content=rows) | {"image": Image.new("RGB", (4, 4)), "image_url": "https://example.org/a.png"}
    assert len(parse_chat(raw | {"file_name": "a.png"}, "here", None).images) == 1


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_message_beside_the_turns_is_read(key):
    conversations = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    parsed = parse_chat({"conversations": conversations, key: "Be brief."}, "here", None)
    assert parsed.messages[0] == {"role": "system", "content": "Be brief."} and len(parsed.messages) == 3
    again = {"conversations": [{"from": "system", "value": "Be brief."}, *conversations], key: "Be brief."}
    assert parse_chat(again, "here", None).messages == parsed.messages
    with pytest.raises(ValueError, match="differs from the system message"):
        parse_chat(again | {key: "Be kind."}, "here", None)


def test_a_lost_key_is_named_with_file_and_line_and_can_be_left_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(sample()) + "\n" + json.dumps(sample(video="clip.mp4")) + "\n")
    with pytest.raises(ValueError, match=r"chats.jsonl:2: the key 'video' \('clip.mp4'\).*--skip-bad"):
        ChatDataset(path)
    assert len(ChatDataset(path, skip_bad=True)) == 1


def test_columns_of_a_data_set_are_looked_at_when_it_is_opened():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([sample(video=None), sample(video="clip.mp4")])
    with pytest.raises(ValueError, match="sample 1: the key 'video'"):
        ChatDataset(rows)
    good = ChatDataset(rows, skip_bad=True)
    assert len(good) == 1 and good[0].messages[1]["content"] == ANSWER


def test_an_image_that_is_missing_from_the_list_of_them_is_named():
    for missing in (None, ""):
        with pytest.raises(ValueError, match="here: (an|the) image "):
            parse_chat(with_turn(0, content=f"<image>{QUESTION}") | {"images": [missing]}, "here", None)
    assert parse_chat(sample(images=[None]), "here", None).images == []  # as tables have it for a text


@pytest.mark.parametrize("line", ['{"messages": [], "messages": []}', '{"messages": [{"role": "user", "role": "x"}]}'])
def test_a_key_that_is_there_twice_is_refused(line, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(sample()) + "\n" + line)
    with pytest.raises(ValueError, match="chats.jsonl:2: .*appears twice"):
        ChatDataset(path)


LINES = json.dumps(sample()) + "\n" + json.dumps(sample()) + "\n"
OTHER_FORMS = {
    "nothing": (b"", "empty"),
    "blank lines": (b"\n \n", "empty"),
    "a list on one line": (json.dumps([sample()]).encode(), "a JSON list"),
    "a list over several lines": (json.dumps([sample()], indent=2).encode(), "a JSON list"),
    "a list, one item a line": (("[\n" + LINES.strip().replace("\n", ",\n") + "\n]").encode(), "a JSON list"),
    "one object over several lines": (json.dumps(sample(), indent=2).encode(), "single JSON document"),
    "CSV": (b"question,answer\nWhat?,That.\n", "starts with 'question,answer'"),
    "UTF-16": (LINES.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (LINES.encode("utf-16-le"), "UTF-16"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "compressed with gzip"),
    "zip": (b"PK\x03\x04rest", "a zip archive"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_file_of_another_form_is_refused_as_a_whole(name, tmp_path):
    content, form = OTHER_FORMS[name]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=rf"chats.jsonl is not JSONL \(one object per line\): it is .*{form}"):
            ChatDataset(path, skip_bad=skip_bad)
