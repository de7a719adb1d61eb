"""A save that dies: the old folder is whole, and the next save is not hindered."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_genieblue import IMAGE, change_adapter, row, save_tiny_pair, tiles

from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor, saving_genieblue
from modeling_genieblue import language_adapter_genieblue as adapter_module

ROOT = Path(__file__).parents[2]
REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()

load = GenieBlueForConditionalGeneration.from_pretrained


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_pair(tmp_path)


def disk_full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


PHASES = {
    "weights": (saving_genieblue, "save_file"),
    "adapter": (adapter_module, "save_file"),
    "fingerprint": (saving_genieblue, "_write_samples"),
    "code": (saving_genieblue.shutil, "copyfile"),
    "processor": (GenieBlueProcessor, "save_pretrained"),
    "config": (json, "dumps"),
}


@pytest.mark.parametrize(("phase", "existing"), [*((phase, True) for phase in PHASES), ("weights", False)])
def test_full_disk_leaves_the_old_folder_whole(phase, existing, tmp_path, monkeypatch):
    folder = save_tiny_pair(tmp_path)
    model = change_adapter(load(folder))
    before = contents(tmp_path)
    target = folder if existing else tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(*PHASES[phase], disk_full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(target)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "genieblue"]
    model.save_pretrained(target)
    assert torch.equal(load(target)(REQUEST, pixel_values=PIXELS).logits, model(REQUEST, pixel_values=PIXELS).logits)


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_rename_leaves_the_old_folder_whole(failing, folder, tmp_path, monkeypatch):
    model = change_adapter(load(folder))
    before, calls, rename = contents(tmp_path), [], os.rename

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_once)
        with pytest.raises(OSError, match="busy"):
            model.save_pretrained(folder)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "genieblue"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_save_leaves_the_old_folder_whole(error, folder, tmp_path, monkeypatch):
    model = change_adapter(load(folder))
    before = contents(tmp_path)

    def interrupt(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "save_file", interrupt)
        with pytest.raises(error):
            model.save_pretrained(folder)
    assert contents(tmp_path) == before


KILLED_SAVE = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from tiny_genieblue import change_adapter
from modeling_genieblue import GenieBlueForConditionalGeneration, language_adapter_genieblue as adapter_module
model = change_adapter(GenieBlueForConditionalGeneration.from_pretrained({folder!r}))
save_file = adapter_module.save_file
def die_halfway(tensors, path, **kwargs):
    save_file(tensors, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
adapter_module.save_file = die_halfway
model.save_pretrained({folder!r})
"""


def test_killed_save_leaves_the_old_folder_whole(folder, tmp_path):
    before = contents(folder)
    code = KILLED_SAVE.format(root=str(ROOT), tests=str(ROOT / "tests" / "support"), folder=str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert contents(folder) == before
    model = change_adapter(load(folder))
    model.save_pretrained(folder)  # and what the dead process left behind is not in the way
    assert torch.equal(load(folder)(REQUEST, pixel_values=PIXELS).logits, model(REQUEST, pixel_values=PIXELS).logits)
