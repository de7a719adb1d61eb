"""Packing: which samples share a row, and what such a row holds."""

from fractions import Fraction

import pytest
import torch
from PIL import Image
from training_setup import chat, make_base, make_data, make_model

from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator, EncodedChats, joined
from genieblue.data.mixture import MixedChats
from genieblue.data.packing import PackedChats, best_fit, row_lengths

LENGTH = 128


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_model(make_base(tmp_path_factory.mktemp("base") / "base"))[1]


def encoded(processor, data=None, *, max_length=LENGTH, skip_bad=False, **options) -> EncodedChats:
    chats = ChatDataset(make_data() if data is None else data, skip_bad=skip_bad)
    return EncodedChats(chats, ChatCollator(processor, max_length=max_length), **options)


def rows_of(packs) -> list[tuple]:
    """The ids of every sequence in every pack, and how many tokens of each pack are used."""
    found = []
    for number in range(len(packs)):
        (row,) = packs[number]
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        ends = [*starts[1:], len(row["input_ids"])]
        found += [tuple(row["input_ids"][start:end]) for start, end in zip(starts, ends, strict=True)]
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_in_exactly_one_pack(processor, shuffle):
    data = encoded(processor)
    packs = PackedChats(data, shuffle=shuffle)
    assert len(packs) < len(data)
    assert sorted(rows_of(packs)) == sorted(tuple(row["input_ids"]) for index in range(11) for row in data[index])
    assert all(len(packs[number][0]["input_ids"]) <= LENGTH for number in range(len(packs)))


def test_equal_seeds_give_equal_packs_and_others_do_not(processor):
    first, same, other = (rows_of(PackedChats(encoded(processor), seed=seed)) for seed in (1, 1, 2))
    assert first == same and first != other


def test_without_shuffling_packs_keep_the_order_of_the_data(processor):
    data = [chat(f"What is {number}?", "A number.") for number in range(9)]  # all of one length
    rows = [tuple(row["input_ids"]) for index in range(9) for row in encoded(processor, data)[index]]
    assert rows_of(PackedChats(encoded(processor, data), shuffle=False)) == rows


def test_best_fit_fills_packs_and_never_over_their_capacity():
    lengths = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = best_fit(lengths, 100)
    assert sorted(place for pack in packs for place in pack) == list(range(500))
    used = [sum(lengths[place] for place in pack) for pack in packs]
    assert max(used) <= 100 and sum(used) > 0.97 * 100 * (len(packs) - 1)


def test_lengths_are_measured_without_reading_pixels(processor, tmp_path, monkeypatch):
    for number, size in enumerate([(24, 24), (48, 24), (24, 60), (100, 30)]):
        image = Image.new("RGB", size)
        turned = image.getexif()
        turned[0x0112] = 6 if number % 2 else 1  # a phone held upright
        image.save(tmp_path / f"{number}.{'png' if number < 2 else 'jpg'}", exif=turned)
    names = sorted(path.name for path in tmp_path.iterdir())
    data = [chat("<image>\nWhich colour?", "Black.", name) for name in names]
    chats = ChatDataset(data, image_folder=tmp_path)
    collator = ChatCollator(processor)
    expected = [[len(row["input_ids"]) for row in collator.rows(chats[index])] for index in range(4)]
    assert len({length for (length,) in expected}) > 1
    monkeypatch.setattr(Image.Image, "convert", None)
    assert PackedChats(EncodedChats(chats, collator)).lengths == expected


def test_sample_whose_pixels_are_damaged_is_left_out_of_its_pack(processor, tmp_path, caplog):
    Image.effect_noise((64, 64), 90).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    data = [chat("<image>\nWhat?", "Noise.", tmp_path / "cut.png"), *make_data()[-2:]]
    chats = ChatDataset(data, image_folder=tmp_path, skip_bad=True)
    collator = ChatCollator(processor, max_length=LENGTH)
    packs = PackedChats(EncodedChats(chats, collator))
    assert len(packs.lengths[0]) == 1
    assert len(rows_of(packs)) == 2 and "Skipped sample 0" in caplog.text


def test_sample_that_cannot_be_measured_is_an_error_naming_it_or_skipped(processor, tmp_path):
    (tmp_path / "no.png").write_bytes(b"not an image")
    data = [*make_data()[-2:], chat("<image>\nWhat?", "Noise.", "no.png")]
    collator = ChatCollator(processor, max_length=LENGTH)
    with pytest.raises(ValueError, match="sample 2: .*cannot be read as an image.*--skip-bad"):
        PackedChats(EncodedChats(ChatDataset(data, image_folder=tmp_path), collator))
    packs = PackedChats(EncodedChats(ChatDataset(data, image_folder=tmp_path, skip_bad=True), collator))
    assert packs.lengths[2] == [] and len(rows_of(packs)) == 2


def test_samples_without_an_image_are_in_no_pack_where_images_are_needed(processor):
    packs = PackedChats(encoded(processor, skip_bad=True, need_images=True))
    assert len(rows_of(packs)) == 8


def test_first_token_of_a_sample_is_not_predicted_by_the_sample_before():
    pack = joined([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}])
    assert pack["labels"] == [-100, 6, -100, 8, 9] and pack["position_ids"] == [0, 1, 0, 1, 2]


def test_a_sample_in_a_pack_is_what_it_is_alone(processor):
    """Its labels, positions and tiles too, whatever its texts hold."""
    pictures = [Image.new("RGB", size, "red") for size in ((24, 24), (60, 24), (24, 60))]
    data = [
        chat([{"type": "text", "text": f"{index} <image>"}, {"type": "image", "image": picture}], "\n<image>\n")
        for index, picture in enumerate(pictures)
    ]
    data += [chat("<s><|user|></s>", " b "), chat("<image>\n<image>", "c", *pictures[:2])]
    data[0]["messages"] = [{"role": "system", "content": ""}, *data[0]["messages"], *data[3]["messages"]]
    data[4]["messages"] += chat("d" * LENGTH, "too long for the row")["messages"]
    samples = encoded(processor, data)
    packs = PackedChats(samples)
    assert len(packs) < len(data)
    alone = {tuple(row["input_ids"]): row for index in range(len(data)) for row in samples[index]}
    for (pack,) in (packs[number] for number in range(len(packs))):
        rows = [alone[ids] for ids in rows_of([[pack]])]
        assert pack["labels"] == [label for row in rows for label in (-100, *row["labels"][1:])]
        assert pack["position_ids"] == [place for row in rows for place in range(len(row["labels"]))]
        for name in ("pixel_values", "num_tiles"):
            shown = [row[name] for row in rows if name in row]
            assert torch.equal(pack[name], torch.cat(shown)) if shown else name not in pack


def test_packs_are_padded_as_sequences_of_their_own_and_joined_in_one_row_if_asked(processor):
    rows = [{"input_ids": list(range(7, 7 + size)), "labels": [-100] * size} for size in (3, 2, 2)]
    packs = [[joined(rows[:2])], [joined(rows[2:])]]
    batch = ChatCollator(processor)(packs)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]] and "attention_mask" not in batch
    batch = ChatCollator(processor, joins_packs=True)(packs)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["input_ids"].tolist() == [[7, 8, 9, 7, 8, 7, 8]]


def test_worker_processes_measure_the_same_and_name_a_bad_sample(processor):
    assert row_lengths(encoded(processor), 2) == row_lengths(encoded(processor))
    data = [*make_data()[-2:], chat("What?", "Stop at </s> now.")]
    with pytest.raises(ValueError, match="^sample 2: the answer contains"):
        row_lengths(encoded(processor, data), 1)


def test_samples_that_a_mixture_repeats_are_packed_as_often(processor):
    parts = {"many": ChatDataset(make_data()), "few": ChatDataset(make_data()[-2:])}
    mixed = EncodedChats(MixedChats(parts, dict.fromkeys(parts, Fraction(1))), ChatCollator(processor))
    expected = [tuple(row["input_ids"]) for index in range(len(mixed)) for row in mixed[index]]
    assert sorted(rows_of(PackedChats(mixed))) == sorted(expected) and len(expected) == 22
