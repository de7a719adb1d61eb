"""Runs of `quantize` that meet others in the same place, at the same time or killed before, or files of users."""

import signal
import subprocess
import sys

import pytest
from command_line import REPOSITORY
from tiny_quantized import answers, contents, large_pair, leftovers, load, quantize, quantized_pair, same
from typer.testing import CliRunner

from conversion.lora_form import export_lora
from conversion.quantization import quantize as quantize_module
from conversion.stack import stack_on
from genieblue.cli.app import app
from modeling_genieblue.staging_genieblue import NewFolder

W8 = {"llm": "w8a16", "rounding": "rtn"}
OURS = {"notes.md": "mine", ".git/HEAD": "ref", "LICENSE": "mine too", "extra/data.bin": "1", "tool.py": "print()"}


# What users put there


def test_files_of_users_stay_in_both_folders_that_are_replaced(tmp_path):
    quantize(large_pair(), tmp_path, **W8)
    for folder in ("genieblue", "base"):
        for name, text in OURS.items():
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "base/vocab.json").write_text("of another tokenizer")
    (tmp_path / "base/README.md").write_text("my own words")
    quantize(large_pair(), tmp_path, {"overwrite": True}, rounding="rtn")
    for folder in ("genieblue", "base"):
        assert {name: (tmp_path / folder / name).read_text() for name in OURS} == OURS
    assert not (tmp_path / "base/vocab.json").exists()
    assert (tmp_path / "base/README.md").read_text() == "my own words"
    assert leftovers(tmp_path) == ["base", "genieblue"]
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair(rounding="rtn") / "genieblue")))


@pytest.mark.parametrize(
    "again", [{"self_contained": True}, {"base_output": "base"}], ids=lambda given: next(iter(given))
)
def test_files_of_users_stay_beside_a_base_in_a_subfolder(again, tmp_path):
    quantize(large_pair(), tmp_path, {"self_contained": True}, **W8)
    inner = tmp_path / "genieblue/base"
    (inner / "notes.md").write_text("mine")
    again = {name: tmp_path / value if name == "base_output" else value for name, value in again.items()}
    quantize(large_pair(), tmp_path, {**again, "overwrite": True}, rounding="rtn")
    assert (inner / "notes.md").read_text() == "mine"
    assert (inner / "config.json").exists() == ("self_contained" in again)
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair(rounding="rtn") / "genieblue")))


# At the same time


@pytest.fixture
def meanwhile(monkeypatch):
    """Calls a function once, while the first quantization is at work."""

    def set_up(function):
        def once(*arguments, **options):
            monkeypatch.undo()
            function()
            return round_parts(*arguments, **options)

        round_parts = quantize_module.round_parts
        monkeypatch.setattr(quantize_module, "round_parts", once)

    return set_up


@pytest.mark.parametrize("shared", ["genieblue", "base"])
def test_a_second_run_into_the_same_place_is_refused_at_once(shared, tmp_path, meanwhile):
    def second():
        own = {"genieblue": tmp_path / "other-genieblue", "base": tmp_path / "other-base"}
        places = own | {shared: tmp_path / shared}
        with pytest.raises(OSError, match=f"Another conversion is writing to {tmp_path / shared}"):
            quantize_module.quantize_genieblue(large_pair(), places["genieblue"], base_output=places["base"])

    meanwhile(second)
    quantize(large_pair(), tmp_path, **W8)
    assert leftovers(tmp_path) == ["base", "genieblue"]


@pytest.mark.parametrize("made", ["genieblue", "base"])
def test_what_was_made_there_meanwhile_is_not_replaced(made, tmp_path, meanwhile):
    def make():
        (tmp_path / made).mkdir()
        (tmp_path / made / "mine").write_text("mine")

    meanwhile(make)
    with pytest.raises(FileExistsError, match=f"{made} was made by something else"):
        quantize(large_pair(), tmp_path, **W8)
    assert contents(tmp_path) == {f"{made}/mine": b"mine"} and leftovers(tmp_path) == [made]


def _export(out):
    export_lora(large_pair(), out)


def _stack(out):
    stack_on(large_pair(), large_pair().parent / "base-llm", out)


@pytest.mark.parametrize("command", [_export, _stack])
def test_other_conversions_replace_nothing_that_was_made_meanwhile(command, tmp_path, monkeypatch):
    out, enter = tmp_path / "out", NewFolder.__enter__

    def make(self):
        out.mkdir()
        (out / "mine").write_text("mine")
        return enter(self)

    monkeypatch.setattr(NewFolder, "__enter__", make)
    with pytest.raises(FileExistsError, match="out was made by something else"):
        command(out)
    assert contents(tmp_path) == {"out/mine": b"mine"} and leftovers(tmp_path) == ["out"]


def test_two_exports_into_the_same_folder_do_not_run_at_once(tmp_path, monkeypatch):
    out, enter, seen = tmp_path / "out", NewFolder.__enter__, []

    def second(self):
        monkeypatch.undo()
        with pytest.raises(OSError, match="Another conversion is writing"):
            _export(out)
        seen.append(self.target)
        return enter(self)

    monkeypatch.setattr(NewFolder, "__enter__", second)
    _export(out)
    assert seen == [out] and leftovers(tmp_path) == ["out"]


# Killed before

KILLED = """
import os, sys

from genieblue.cli.app import app
from modeling_genieblue.staging_genieblue import NewFolder

put_in_place = NewFolder.put_in_place

def place(self, *options):
    put_in_place(self, *options)
    if self.target.name == "base":
        other = self.target.parent
        made = [path for path in other.glob(".genieblue.saving-*/genieblue/config.json")]
        print("whole" if made else "not yet written", flush=True)
        os.kill(os.getpid(), 9)

NewFolder.put_in_place = place
app(sys.argv[1:])
"""


def test_a_pair_that_a_killed_run_parted_is_told_and_can_be_put_together(tmp_path):
    quantize(large_pair(), tmp_path, **W8)
    before = contents(tmp_path)
    command = ["quantize", str(large_pair()), "--out", str(tmp_path / "genieblue"), "--base-out",
               str(tmp_path / "base"), "--rounding", "rtn"]  # fmt: skip
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command, "--overwrite"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert killed.returncode == -signal.SIGKILL and killed.stdout == "whole\n", killed.stderr
    (old,) = tmp_path.glob(".base.writing-*/base.old")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    words = " ".join(result.stderr.split())
    assert f"{tmp_path}/genieblue was made on the base in {old}" in words
    assert f"remove {tmp_path}/base and move {old} there" in words

    # As it says, or with a run that replaces both, after which nothing is to be moved back.
    again = CliRunner().invoke(app, [*command, "--overwrite"])
    assert again.exit_code == 0, again.output
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair(rounding="rtn") / "genieblue")))
    last = CliRunner().invoke(app, [*command, "--overwrite"])
    said = " ".join(last.stderr.split())
    assert "made on the base in" not in said and "move it back" not in said and f"{old} was" in said
    assert contents(old) == {name.removeprefix("base/"): text for name, text in before.items() if name[:5] == "base/"}
