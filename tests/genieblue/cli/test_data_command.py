"""`genieblue data check`: what it counts, and what it finds."""

import json

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_genieblue import save_tiny_pair

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("model"))


def line(question: str, image: str | None = None) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
    return json.dumps({"messages": turns, **({} if image is None else {"images": [image]})}) + "\n"


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (96, 48), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    good = line("<image>Colour?", "red.png") + line("1?") + line("<image>Which?", "red.png")
    (tmp_path / "good.jsonl").write_text(good)
    bad = (
        line("<image>A?", "broken.png")
        + line("<image>B?", "none.png")
        + line("1?")
        + "{\n"
        + line("<image><image>C?", "red.png")
    )
    (tmp_path / "bad.jsonl").write_text(bad)
    return tmp_path


def test_good_data_ends_well_with_counts_by_group(data):
    document = run_json("data", "check", f"ocr={data / 'good.jsonl'}", "--json")
    assert document["groups"] == {"ocr": {"with_images": 2, "text_only": 1, "images": 2, "bad": 0}}
    assert document["characters"]["max"] == len("Colour?x") and document["tiles_per_image"] is None
    assert document["duplicates"]["count"] == document["bad"]["count"] == 0


def test_a_model_counts_tokens_and_tiles_as_training_does(data, model):
    from genieblue.data.chats import ChatDataset
    from genieblue.data.collation import ChatCollator
    from modeling_genieblue import GenieBlueProcessor

    collator = ChatCollator(GenieBlueProcessor.from_pretrained(model))
    rows = [collator.encode(sample) for sample in ChatDataset(data / "good.jsonl")]
    document = run_json("data", "check", data / "good.jsonl", "--model", model, "--max-length", 12, "--json")
    lengths = [len(row["input_ids"]) for row in rows]
    assert document["tokens"]["max"] == max(lengths) and document["tokens"]["min"] == min(lengths)
    assert document["tiles_per_image"]["max"] == len(rows[0]["pixel_values"])
    assert document["longer_than_12"] == sum(length > 12 for length in lengths)


def test_bad_samples_and_duplicates_are_named_and_end_with_exit_code_1(data):
    files = (data / "good.jsonl", data / "bad.jsonl")
    document = run_json("data", "check", *files, "--json", code=1)
    assert document["bad"]["count"] == 4 and document["unreadable_images"] == 2
    assert [where.rsplit("/", 1)[-1] for where, _ in document["bad"]["first"]] == [
        f"bad.jsonl:{number}" for number in (1, 2, 4, 5)
    ]
    assert document["duplicates"]["first"] == [[f"{data / 'bad.jsonl'}:3", f"{data / 'good.jsonl'}:2"]]
    table = run("data", "check", *files, code=1).stdout
    assert "Bad: 4 samples, 2 of them with an image that cannot be opened" in table
    assert "1 × not valid JSON" in table and "placeholders" in table


def test_reasons_are_counted_without_what_differs(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(line("<image>A?", f"{number}.png") for number in range(12)))
    document = run_json("data", "check", tmp_path / "a.jsonl", "--json", code=1)
    assert list(document["bad"]["reasons"].values()) == [12] and len(document["bad"]["first"]) == 10


def test_histograms_are_drawn(data, model, tmp_path):
    run("data", "check", data / "good.jsonl", "--model", model, "--out", tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").size[1] > 600  # lengths and tiles


def test_what_cannot_be_checked_is_refused_first(data, tmp_path):
    assert "is not a file" in error_of("data", "check", tmp_path / "none.jsonl")
    assert "--out" in error_of("data", "check", data / "good.jsonl", "--out", tmp_path / "report.txt", code=2)
