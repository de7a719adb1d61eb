"""`optimum-cli genieblue-quantize`: there once our wheel is installed, the same command as `genieblue quantize`."""

import json
import shutil
import subprocess
import sys
import sysconfig
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from command_line import run
from tiny_quantized import contents, large_pair

from genieblue.cli.app import app
from modeling_genieblue.model_files_genieblue import QUANTIZED_WEIGHTS_NAME
from optimum_cli import register_genieblue

ROOT = Path(__file__).parents[2]
ROOMS = ("modeling_genieblue", "hub_cards", "conversion", "genieblue", "optimum_cli")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged: a build leaves traces beside it."""
    folder = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def site(source, tmp_path_factory) -> Path:
    """A site-packages folder in which the project is installed from its wheel."""
    return install(source, tmp_path_factory.mktemp("wheel"))


def install(source: Path, target: Path, *options: str) -> Path:
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, *options, str(source)], check=True)
    return target


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


# Each command is a process of its own, but for the libraries, which take seconds to import.
COMMANDS = """
import json, os, site, sys, sitecustomize
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import torch._dynamo, transformers, peft
from optimum.commands.optimum_cli import main
codes = []
for place, arguments in enumerate(json.loads(sys.argv[3])):
    if (child := os.fork()) == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = ["optimum-cli", *arguments]
        sys.exit(main())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def optimum_cli(site: Path, folder: Path, *commands: tuple) -> list[Ended]:
    """Runs commands in processes that have `site`, and of this environment all but how the project is installed."""
    # -S leaves out the .pth files of the environment, among them that of an editable install.
    lists = json.dumps([list(map(str, command)) for command in commands])
    start = [sys.executable, "-S", "-c", COMMANDS, str(site), sysconfig.get_path("purelib"), lists]
    codes = json.loads(subprocess.run(start, cwd=folder, stdout=subprocess.PIPE, check=True).stdout)
    return [
        Ended(code, *((folder / f"{place}.{name}").read_text() for name in ("out", "err")))
        for place, code in enumerate(codes)
    ]


OPTIONS = (
    "--llm", "w8a16", "--replicated=w4a16", "--rounding", "rtn", "--group-size=32", "--self-contained", "--json",
)  # fmt: skip


@pytest.fixture(scope="module")
def ended(site) -> dict[str, Ended]:
    """What commands of the installed wheel gave; the one that quantizes wrote `one` beside it."""
    folder = site.parent
    commands = {
        "help": ("--help",),
        "its help": ("genieblue-quantize", "--help"),
        "quantize": ("genieblue-quantize", large_pair(), "--out", folder / "one", *OPTIONS),
        "error": ("genieblue-quantize", large_pair(), "--out", large_pair()),
        "bad option": ("genieblue-quantize", large_pair(), "--out", folder / "x", "--llm", "w3"),
    }
    return dict(zip(commands, optimum_cli(site, folder, *commands.values()), strict=True))


def check_listed(result: Ended) -> None:
    assert result.returncode == 0 and "genieblue-quantize" in result.stdout
    assert "genieblue" not in result.stderr  # quanto's own plug-in prints one


def test_an_installed_command_is_listed_and_prints_no_error(ended):
    check_listed(ended["help"])


def test_an_editable_command_is_listed_and_prints_no_error(source, tmp_path):
    check_listed(*optimum_cli(install(source, tmp_path / "site", "--editable"), tmp_path, ("--help",)))


def test_its_options_are_those_of_genieblue_quantize(ended):
    result = ended["its help"]
    assert result.returncode == 0, result.stderr
    names = [name for parameter in typer.main.get_command(app).commands["quantize"].params for name in parameter.opts]
    assert len(names) > 15 and [name for name in names if name not in result.stdout] == []
    assert "{w4a16,w8a16,w16a16}" in result.stdout and "(default: w4a16)" in result.stdout


def test_it_writes_what_genieblue_quantize_writes(ended, site, settings_of_the_process_are_restored):
    result, written = ended["quantize"], site.parent / "one"
    assert result.returncode == 0, result.stderr
    parts = json.loads(result.stdout)["parts"]
    assert {part: entry["precision"] for part, entry in parts.items()}["replicated_blocks"] == "w4a16"
    assert json.loads((written / "config.json").read_text())["quantization"]["group_size"] == 32
    other = site.parent / "other"  # beside it, as it names its source by the way there
    run("quantize", large_pair(), "--out", other, *OPTIONS)
    one, other = contents(written), contents(other)
    assert one.keys() == other.keys()
    for name in ("model.safetensors", f"base/{QUANTIZED_WEIGHTS_NAME}", "config.json"):
        assert one[name] == other[name]


def test_an_empty_value_is_handed_on(monkeypatch):
    """It comes from an unset shell variable, and must not mean that the option was not given."""
    handed_on = []
    monkeypatch.setattr(typer.Typer, "__call__", lambda _app, args, prog_name: handed_on.extend(args))
    parser = ArgumentParser()
    register_genieblue.GenieBlueQuantizeCommand.parse_args(parser)
    arguments = parser.parse_args(["reader", "--out", "new", "--quantized-base", "", "--overwrite"])
    options = {"args": arguments, "parser": parser, "from_defaults_factory": True}
    register_genieblue.GenieBlueQuantizeCommand(None, **options).run()
    assert handed_on == ["quantize", "--out=new", "--quantized-base=", "--overwrite", "--", "reader"]


def test_errors_are_one_sentence_and_exit_codes_those_of_the_command(ended):
    result = ended["error"]
    assert result.returncode == 1 and "Error: " in result.stderr and "Traceback" not in result.stderr
    assert ended["bad option"].returncode == 2
