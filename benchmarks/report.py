"""What the benchmarks share: cases in processes of their own, and tables of figures."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil


def measured_apart(module: str, *arguments: str, threads: int | None = None) -> Any:
    """The JSON on the last line of `python -m module arguments`: a fresh process has its own peak of memory."""
    command = [sys.executable, "-m", module, *arguments]
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return json.loads(output.splitlines()[-1])


class MemoryWatch:
    """The highest resident memory of this process and its children together while it runs, in bytes.

    `own` leaves out what is mapped from files, which the system can drop and read again.
    """

    def __enter__(self) -> "MemoryWatch":
        self.peak, self.own, self._running = 0, 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while self._running:
            total = own_bytes = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    found = process.memory_info()
                    total, own_bytes = total + found.rss, own_bytes + found.rss - found.shared
                except psutil.NoSuchProcess:
                    continue
            self.peak, self.own = max(self.peak, total), max(self.own, own_bytes)
            time.sleep(0.5)


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
