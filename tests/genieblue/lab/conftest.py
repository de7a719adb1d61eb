"""A lab that is finished."""

import shutil

import pytest
from tiny_lab import cells_in_this_process, write_tiny_lab

from genieblue.lab.lab_file import read_lab_file
from genieblue.lab.run import run_lab


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A lab file, and the folder in which all of its cells are done."""
    place = tmp_path_factory.mktemp("lab")
    path = write_tiny_lab(place)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cells_in_this_process(monkeypatch)
        states = run_lab(read_lab_file(path), place / "out")
    assert {state for state, _ in states.values()} == {"done"}, states
    return path, place / "out"


@pytest.fixture
def lab(finished, tmp_path):
    """A copy of the finished lab, to change."""
    shutil.copytree(finished[1], tmp_path / "out")
    return read_lab_file(finished[0]), tmp_path / "out"
