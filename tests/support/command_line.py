"""The command `genieblue` as tests run it: in this process, or in one of its own."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from genieblue.cli.app import app

REPOSITORY = Path(__file__).parents[2]


def run(*arguments, code: int = 0, **options):
    """Runs the command in this process; fails unless it ends with `code`."""
    result = CliRunner().invoke(app, list(map(str, arguments)), **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments, **options):
    """The one JSON document that is all of stdout."""
    return json.loads(run(*arguments, **options).stdout)


def error_of(*arguments, code: int = 1, **options) -> str:
    result = run(*arguments, code=code, **options)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def run_process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "genieblue", *map(str, arguments)]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, **options)
