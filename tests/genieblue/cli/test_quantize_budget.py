"""`genieblue quantize` with a budget: what is refused before a model is read, and how a size is written."""

import pytest
import typer
from typer.testing import CliRunner

from genieblue.cli.app import app
from genieblue.cli.options import read_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1.9GB", 1_900_000_000), ("800 MB", 800_000_000), ("2GiB", 2 << 30), ("12345", 12345), ("3g", 3_000_000_000),
     ("1.001GB", 1_001_000_000), ("9" * 400, int("9" * 400))],
    ids=lambda value: str(value)[:9],
)  # fmt: skip
def test_sizes_have_units(size, expected):
    assert read_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "1.9TB", "-1GB", "1,9GB", "many"])
def test_other_sizes_are_refused(size):
    with pytest.raises(typer.BadParameter, match="such as 1.9GB"):
        read_bytes(size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits-per-weight", "4.5"], "give --calibration"),
        (["--max-bytes", "1.9GB", "--group-size", "32"], "leave out --group-size"),
        (["--chart", "plan.png"], "no formats are chosen"),
        (["--max-bytes", "1.9GB", "--calibration", "x.txt", "--chart", "plan.svg"], "not a PNG file"),
        (["--max-bytes", "1.9GB", "--bits-per-weight", "5", "--calibration", "x.txt"], "either"),
    ],
    ids=["no data", "groups", "chart alone", "no PNG", "both"],
)
def test_options_that_contradict_a_budget_are_refused(options, message, tmp_path):
    result = CliRunner().invoke(app, ["quantize", "model", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception or "")).replace("│", " ").split())
    assert not (tmp_path / "out").exists()
