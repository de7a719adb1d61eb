"""The memory that a run has needed: its own, not that of the process that started it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genieblue.training import memory
from genieblue.training.memory import peak_memory, peak_resident_memory

ROOT = Path(__file__).parents[3]
MB = 1 << 20
CHILD = """
import json, resource
from genieblue.training.memory import peak_resident_memory
before = peak_resident_memory()
held = b"x" * (64 << 20)
during = peak_resident_memory()
del held
inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([before, during, peak_resident_memory(), inherited]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_the_peak_is_of_the_process_itself_and_not_of_the_one_that_started_it():
    held = b"x" * (256 * MB)
    child = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, check=True, capture_output=True, text=True)
    before, during, after, inherited = json.loads(child.stdout)
    assert before < 128 * MB
    # Linux counts each core's pages by itself, so that a figure is off by some.
    assert during - before == pytest.approx(64 * MB, abs=8 * MB)
    assert after == pytest.approx(during, abs=8 * MB)  # a peak stays when memory is given back
    assert inherited >= len(held)  # what `ru_maxrss` would have said


def test_on_a_gpu_the_peak_is_what_was_allocated_there(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    assert peak_memory(torch.device("cuda:1")) == 7 and asked == [torch.device("cuda:1")]
    # A GPU that the run does not use says nothing of it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_memory(torch.device("cpu")) > MB and len(asked) == 1


@pytest.mark.parametrize("text", [None, "Name:\tpython\nVmRSS:\t  100 kB\n"], ids=["no file", "no such line"])
def test_a_system_that_keeps_no_peak_gives_none(tmp_path, monkeypatch, text):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    monkeypatch.setattr(memory, "STATUS", status)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_resident_memory() is None
