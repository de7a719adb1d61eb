"""`optimum-cli genieblue-quantize`: there once our wheel is installed, the same command as `genieblue quantize`."""

import json
import shutil
import subprocess
import sys
import sysconfig
from argparse import ArgumentParser
from pathlib import Path

import pytest
import typer
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


def optimum_cli(site: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs the command in a process that has `site`, and of this environment all but how the project is installed."""
    # -S leaves out the .pth files of the environment, among them that of an editable install.
    start = f"""
import site, sys, sitecustomize
site.addsitedir({str(site)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
from optimum.commands.optimum_cli import main
main()
"""
    return subprocess.run(
        [sys.executable, "-S", "-c", start, *map(str, arguments)], cwd=site.parent, capture_output=True, text=True
    )


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["wheel", "editable"])
def test_an_installed_command_is_listed_and_prints_no_error(source, tmp_path, options):
    result = optimum_cli(install(source, tmp_path / "site", *options), "--help")
    assert result.returncode == 0 and "genieblue-quantize" in result.stdout
    assert "genieblue" not in result.stderr  # quanto's own plug-in prints one


def test_its_options_are_those_of_genieblue_quantize(site):
    result = optimum_cli(site, "genieblue-quantize", "--help")
    assert result.returncode == 0, result.stderr
    names = [name for parameter in typer.main.get_command(app).commands["quantize"].params for name in parameter.opts]
    assert len(names) > 15 and [name for name in names if name not in result.stdout] == []
    assert "{w4a16,w8a16,w16a16}" in result.stdout and "(default: w4a16)" in result.stdout


def test_it_writes_what_genieblue_quantize_writes(site, tmp_path):
    options = ["--llm", "w8a16", "--replicated=w4a16", "--rounding", "rtn", "--group-size=32", "--self-contained"]
    options += ["--json"]
    result = optimum_cli(site, "genieblue-quantize", large_pair(), "--out", tmp_path / "one", *options)
    assert result.returncode == 0, result.stderr
    parts = json.loads(result.stdout)["parts"]
    assert {part: entry["precision"] for part, entry in parts.items()}["replicated_blocks"] == "w4a16"
    assert json.loads((tmp_path / "one/config.json").read_text())["quantization"]["group_size"] == 32
    arguments = ["quantize", str(large_pair()), "--out", str(tmp_path / "other"), *options]
    subprocess.run([sys.executable, "-m", "genieblue", *arguments], check=True, capture_output=True, cwd=ROOT)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
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


def test_errors_are_one_sentence_and_exit_codes_those_of_the_command(site, tmp_path):
    result = optimum_cli(site, "genieblue-quantize", large_pair(), "--out", large_pair())
    assert result.returncode == 1 and "Error: " in result.stderr and "Traceback" not in result.stderr
    refused = optimum_cli(site, "genieblue-quantize", large_pair(), "--out", tmp_path / "x", "--llm", "w3")
    assert refused.returncode == 2
