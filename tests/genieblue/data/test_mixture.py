"""Mixtures: how weights are read, which samples an epoch has, and what is refused before anything is opened."""

import json
from collections import Counter

import pytest
from PIL import Image

from genieblue.data.mixture import open_mixture, read_parts


def write(path, count, *, images=False):
    """A JSONL file of `count` samples, named `<stem><number>`."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{'<image>' if images else ''}{path.stem}{number}"},
                {"role": "assistant", "content": "x"},
            ],
            **({"images": ["a.png"]} if images else {}),
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(chats):
    contents = [chats[index].messages[0]["content"] for index in range(len(chats))]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


def by_letter(chats):
    return Counter(question[0] for question in questions(chats))


def test_without_weights_every_sample_is_drawn_once(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 5), write(tmp_path / "b.jsonl", 3)
    chats = open_mixture([str(a), str(b)])
    assert sorted(questions(chats)) == [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)]
    assert chats.num_samples == len(chats) == 8


def test_a_weight_is_a_share_of_the_samples_drawn(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 60), write(tmp_path / "b.jsonl", 10)
    chats = open_mixture([f"{a}:0.3", f"{b}:0.7"])
    assert len(chats) == 200 and by_letter(chats) == {"a": 60, "b": 140}
    assert chats.shares() == {str(a): 0.3, str(b): 0.7}
    assert set(Counter(questions(chats)).values()) == {1, 14}  # repeats are even over a part's samples


def test_shares_hold_in_every_stretch_of_an_epoch(tmp_path):
    chats = open_mixture([f"{write(tmp_path / 'a.jsonl', 90)}:3", f"{write(tmp_path / 'b.jsonl', 5)}:1"])
    found = [question[0] for question in questions(chats)]
    assert all(abs(Counter(found[start : start + 20])["a"] - 15) <= 1 for start in range(len(found) - 20))


def test_a_share_of_texts_reweighs_both_kinds(tmp_path):
    images, texts = write(tmp_path / "i.jsonl", 10, images=True), write(tmp_path / "t.jsonl", 90)
    chats = open_mixture([str(images), str(texts)], text_share=0.25)
    count = sum(not chats[index].images for index in range(len(chats)))
    assert count == len(chats) / 4 and by_letter(chats)["t"] == count
    assert len(open_mixture([str(images), str(texts)], text_share=0)) == 10


def test_a_mixture_is_the_same_each_time_and_knows_its_data(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 7), write(tmp_path / "b.jsonl", 4)
    first, second = (open_mixture([f"{a}:2", f"{b}:1"]) for _ in range(2))
    assert questions(first) == questions(second) and first.sha256 == second.sha256
    assert first.sha256 != open_mixture([f"{a}:1", f"{b}:1"]).sha256
    assert first.where(0).startswith(str(a)) and len(first.sample_hashes()) == 11


def test_with_images_keeps_the_weights(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 6, images=True), write(tmp_path / "b.jsonl", 2, images=True)
    b.write_text(b.read_text() + write(tmp_path / "c.jsonl", 9).read_text())
    assert by_letter(open_mixture([f"{a}:3", f"{b}:1"]).with_images()) == {"a": 6, "b": 2}


PARTS = {
    "a.jsonl": (None, "a.jsonl", None),
    "a.jsonl:2": (None, "a.jsonl", "2"),
    "a.jsonl:0.5": (None, "a.jsonl", "0.5"),
    "a.jsonl:1e1": (None, "a.jsonl", "10"),
    "ocr=a.jsonl": ("ocr", "a.jsonl", None),
    "ocr=a.jsonl:.25": ("ocr", "a.jsonl", "0.25"),
    "a:b.jsonl": (None, "a:b.jsonl", None),
    "a:2": (None, "a:2", None),
    "a:2:3": (None, "a:2", "3"),
    "x=y.jsonl": (None, "x=y.jsonl", None),
    "n=x=y.jsonl:2": ("n", "x=y.jsonl", "2"),
    "C:\\d.jsonl": (None, "C:\\d.jsonl", None),
    "s*.jsonl:2": (None, "s*.jsonl", "2"),
    "hf:you/set[train[:10]]:2": (None, "hf:you/set[train[:10]]", "2"),
    "n=hf:you/set/small@main[test]": ("n", "hf:you/set/small@main[test]", None),
    "hf:you/set:2": (None, "hf:you/set", "2"),
}


@pytest.mark.parametrize("text", PARTS)
def test_names_and_weights_are_told_from_paths(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a:b.jsonl", "a:2", "x=y.jsonl", "C:\\d.jsonl", "s1.jsonl", "s2.jsonl"):
        write(tmp_path / name, 1)
    (part,) = read_parts([text])
    name, source, weight = PARTS[text]
    assert (part.name, part.location.text) == (name or source, source)
    assert part.weight == (None if weight is None else pytest.approx(float(weight)))


REFUSED = {
    "zero": (["a.jsonl:0", "b.jsonl:1"], "The weight of 'a.jsonl' is 0: expected a number above 0"),
    "negative": (["ocr=a.jsonl:-1", "b.jsonl:1"], "The weight of 'ocr' is -1"),
    "not a number": (["a.jsonl:nan"], "The weight of 'a.jsonl' is nan"),
    "infinite": (["a.jsonl:inf"], "The weight of 'a.jsonl' is inf"),
    "missing": (["a.jsonl", "none.jsonl"], "none.jsonl is not a file"),
    "missing with weight": (["x=none.jsonl:2"], "none.jsonl is not a file"),
    "no number": (["a.jsonl:much"], "a.jsonl:much is not a file"),
    "empty": (["a.jsonl", "empty.jsonl"], "empty.jsonl is not JSONL .* it is empty"),
    "empty glob": (["no*.parquet"], "is not a file"),
    "same file": (["a.jsonl:1", "x=./a.jsonl:2"], "a.jsonl is both in 'a.jsonl' and in 'x'"),
    "same by link": (["a.jsonl", "link.jsonl"], "a.jsonl is both in 'a.jsonl' and in 'link.jsonl'"),
    "same in a glob": (["a.jsonl", "[ab].jsonl"], "both in"),
    "same set": (["x=hf:you/set", "y=hf:you/set"], "hf:you/set is both in 'x' and in 'y'"),
    "same name": (["x=a.jsonl", "x=b.jsonl"], "'x' is given twice"),
    "some weights": (["a.jsonl:1", "b.jsonl"], "'b.jsonl' has no weight"),
    "no name on the Hub": (["hf:set"], "names no data set on the Hub"),
    "an unset variable": ([""], "The name of the data is empty"),
    "nothing": ([], "There is no data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_mixture_is_refused_before_anything_is_opened(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 1), write(tmp_path / "b.jsonl", 1)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.setattr("genieblue.data.sources.Location.open", lambda location: pytest.fail("opened"))
    texts, message = REFUSED[name]
    with pytest.raises((ValueError, OSError), match=message):
        open_mixture(texts)


def test_shares_without_samples_are_refused(tmp_path):
    a, b = str(write(tmp_path / "a.jsonl", 2)), str(write(tmp_path / "b.jsonl", 2, images=True))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a number from 0 to 1"):
            open_mixture([a], text_share=share)
    with pytest.raises(ValueError, match="no sample has an image"):
        open_mixture([a], text_share=0.5)
    with pytest.raises(ValueError, match="every sample has an image"):
        open_mixture([b], text_share=0.5)
    with pytest.raises(ValueError, match="a.jsonl' has no sample with an image"):
        open_mixture([a, b]).with_images()
    with pytest.raises(ValueError, match="only samples with images are of use here"):
        open_mixture([a, b], text_share=0.5).with_images()


def test_a_part_of_bad_samples_and_an_endless_epoch_are_refused(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 2), write(tmp_path / "b.jsonl", 1)
    with pytest.raises(ValueError, match="An epoch would have 2,000,000,002 samples until all 2 of .*a.jsonl"):
        open_mixture([f"{a}:1e-9", f"{b}:1"])
    b.write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="b.jsonl' is empty: all of its 1 samples are bad"):
        open_mixture([str(a), str(b)], skip_bad=True)
