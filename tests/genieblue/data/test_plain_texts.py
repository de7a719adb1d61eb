"""Plain texts: which files they are, their paragraphs, and rows of ids."""

import pytest
import torch
from tiny_models import BOS_ID, TRAINING_TEXT, tiny_tokenizer

from genieblue.data.plain_texts import is_plain_text, read_paragraphs, text_batches


@pytest.mark.parametrize("add_bos", [False, True])
def test_texts_are_packed_into_rows(add_bos):
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    lines = TRAINING_TEXT.splitlines()
    rows = text_batches(tokenizer, [lines[0], "  ", lines[1], *lines], length=12, count=6)
    assert [row.shape for row in rows] == [(1, 12)] * 6 and rows[0].dtype == torch.int64
    if add_bos:
        assert all(row[0, 0] == BOS_ID for row in rows)
        rows = [row[:, 1:] for row in rows]
    ids = torch.cat(rows, dim=1)[0]
    assert BOS_ID not in ids
    assert f"{lines[0]}\n\n{lines[1]}\n\n{lines[0]}".startswith(tokenizer.decode(ids[:40]))


def test_texts_that_are_not_needed_are_not_read():
    def endless():
        for _ in range(20):
            yield "The answer is in the question."
        raise AssertionError("read on")

    assert len(text_batches(tiny_tokenizer(), endless(), length=8, count=2)) == 2


@pytest.mark.parametrize(
    ("texts", "length", "count", "message"),
    [
        ([], 8, 2, "0 tokens in 0 texts; a sample of 8 tokens needs 8: give more text"),
        ([" \n"], 8, 2, "0 tokens in 0 texts"),
        (["The sign."], 800, 2, "tokens in 1 texts; a sample of 800 tokens needs 800"),
        (["The sign."], 8, 0, "request for 0 calibration samples of 8 tokens"),
        (["The sign."], 0, 1, "request for 1 calibration samples of 0 tokens"),
    ],
)
def test_too_little_text_is_refused(texts, length, count, message):
    with pytest.raises(ValueError, match=message):
        text_batches(tiny_tokenizer(), texts, length, count)


def test_text_for_fewer_rows_fills_as_many_as_it_can(caplog):
    tokenizer = tiny_tokenizer()
    tokens = len(tokenizer("The sign.\n\n", add_special_tokens=False)["input_ids"])
    rows = text_batches(tokenizer, ["The sign."] * 9, length=tokens, count=64)
    assert len(rows) == 9
    assert f"fill only 9 of 64 samples of {tokens} tokens" in caplog.text


def test_paragraphs_of_a_text_file(tmp_path):
    file = tmp_path / "samples.txt"
    file.write_bytes("\ufeffOne line\r\nand another.\r\n\r\n \n\nZürich\n".encode())
    assert read_paragraphs(file) == ["One line\nand another.", "Zürich"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b" \n\n", ValueError, "contains no text"),
        (b"\xff\xfe\x00", ValueError, "not UTF-8 text"),
        (None, OSError, "cannot be read"),
    ],
)
def test_files_without_text_are_refused(tmp_path, content, error, message):
    file = tmp_path / "samples.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        read_paragraphs(file)


@pytest.mark.parametrize(("name", "expected"), [("a.txt", True), ("B.MD", True), ("a.json", False), ("a", False)])
def test_the_ending_says_what_is_plain_text(name, expected):
    assert is_plain_text(name) is expected
