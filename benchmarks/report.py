"""What the benchmarks share: cases in processes of their own, and tables of figures."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def measured_apart(module: str, *arguments: str, threads: int | None = None) -> Any:
    """The JSON on the last line of `python -m module arguments`: a fresh process has its own peak of memory."""
    command = [sys.executable, "-m", module, *arguments]
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return json.loads(output.splitlines()[-1])


def print_table(title: str, rows: Mapping[str, Mapping[str, float | str]]) -> None:
    """Prints figures by name and column; large numbers without decimals."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n{title:46}" + "".join(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"{name:46}" + "".join(f"{_shown(row.get(column, '')):>20}" for column in columns))


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) > 1e5 else f"{value:.4f}"
