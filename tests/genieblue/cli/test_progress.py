"""Without a terminal, a progress bar is a line every few seconds."""

import os
import pty
import select
import subprocess
import sys
import termios

import pytest

BARS = """
import sys, time
from genieblue.cli import progress
progress.SECONDS = 0.05
progress.log_progress_without_terminal()
progress.log_progress_without_terminal()
from tqdm.auto import tqdm
from huggingface_hub.utils import tqdm as hub_tqdm
def run(bars, steps=40, **options):
    for _ in bars(range(steps), **options):
        time.sleep(0.005)
"""
CASES = {
    "ours": "run(tqdm, desc='Training')",
    "a download's": "run(hub_tqdm, desc='Training', disable=None)",
    "with a postfix": "b = tqdm(total=40, desc='Training')\nfor _ in range(40):\n    b.update()\n"
                      "    b.set_postfix_str('loss 1')\n    time.sleep(0.005)\nb.close()",
    "within another": "run(lambda steps: tqdm([run(tqdm, desc='Training')], leave=False), steps=1)",
}  # fmt: skip


def run(code: str, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    return subprocess.run([sys.executable, "-c", BARS + code], check=True, env=environment, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_bar_in_a_log_file_is_a_few_whole_lines(case):
    written = run(CASES[case], capture_output=True, text=True).stderr
    lines = written.splitlines()
    assert "\r" not in written and "\x1b" not in written
    assert 2 <= len(lines) <= 10 and all(line.startswith("Training: ") for line in lines)
    assert "40/40" in lines[-1]


@pytest.mark.parametrize("options", ["delay=60", "leave=False", "disable=True"])
def test_a_bar_that_is_not_to_be_seen_writes_nothing(options):
    assert run(f"run(tqdm, steps=2, {options})", capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("case", CASES)
def test_bars_are_turned_off_as_ever(case, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as in all processes of a training but the first
    assert run(CASES[case], capture_output=True, text=True).stderr == ""


def test_a_bar_on_a_terminal_is_drawn_over_as_ever():
    watcher, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    run("run(tqdm, desc='Training')", stderr=terminal)
    written = b""  # read before the terminal closes, which may discard what nobody has read
    while written.count(b"\rTraining: ") < 2 and select.select([watcher], [], [], 10)[0]:
        written += os.read(watcher, 1 << 16)
    os.close(terminal)
    os.close(watcher)
    assert written.count(b"\rTraining: ") > 1
