"""Results of a lab: gathered from several machines, refused if they do not fit, and reported."""

import dataclasses
import json
import shutil

import pytest
from tiny_lab import STRUCTURES

from conversion import staging
from genieblue.lab import report
from genieblue.lab.cells import CELL, IMAGES, LAB_FILE, RESULT, Cell
from genieblue.lab.lab_file import write_lab_file
from genieblue.lab.report import write_report
from genieblue.lab.results import LabResults
from genieblue.lab.run import gather


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 0}, "seed was 0 and is 1"),
        ({"text_share": 0.5}, "text_share was 0.5 and is 0.3"),
        ({"base": {"model.safetensors": "other"}}, "base.model.safetensors was 'other'"),
    ],
    ids=["of another place", "of other data", "on another base"],
)
def test_results_of_a_cell_that_was_not_run_here_are_not_reported(lab, changes, message):
    place = Cell("mixed", "genieblue-skip", 1).folder(lab[1]) / CELL
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        write_report(lab[1])


def test_cells_of_another_machine_are_gathered_and_others_refused(lab, tmp_path):
    place = Cell("mixed", "lora", 1).folder(lab[1])
    shutil.copytree(lab[1], tmp_path / "elsewhere")
    shutil.rmtree(place)
    assert gather(lab[1], [tmp_path / "elsewhere"]) == [Cell("mixed", "lora", 1)]
    assert (place / RESULT).is_file() and not (place / "model").exists()
    assert gather(lab[1], [tmp_path / "elsewhere"]) == []
    shutil.rmtree(place)
    strange = Cell("mixed", "lora", 1).folder(tmp_path / "elsewhere") / CELL
    strange.write_text(strange.read_text().replace('"text_share": 0.3', '"text_share": 0.5'))
    with pytest.raises(ValueError, match="text_share was 0.5 and is 0.3"):
        gather(lab[1], [tmp_path / "elsewhere"])
    assert not place.exists()


def test_results_that_disagree_are_refused_and_a_failed_cell_gives_way(lab, tmp_path):
    cell, elsewhere = Cell("mixed", "lora", 1), tmp_path / "elsewhere"
    here, there = cell.folder(lab[1]), cell.folder(elsewhere)
    shutil.copytree(lab[1], elsewhere)
    (here / IMAGES).write_text((here / IMAGES).read_text().replace("0.0", "100.0"))
    with pytest.raises(ValueError, match="are results of one cell and differ"):
        gather(lab[1], [elsewhere])
    (here / RESULT).write_text('{"failed": "The loss is nan"}')
    assert gather(lab[1], [elsewhere]) == [cell] and (here / IMAGES).read_text() == (there / IMAGES).read_text()
    (there / RESULT).write_text('{"failed": "The loss is nan"}')
    assert gather(lab[1], [elsewhere]) == []


def test_a_cell_that_was_copied_in_part_is_not_gathered(lab, tmp_path):
    cell, elsewhere = Cell("mixed", "lora", 1), tmp_path / "elsewhere"
    shutil.copytree(lab[1], elsewhere)
    shutil.rmtree(cell.folder(lab[1]))
    (cell.folder(elsewhere) / IMAGES).unlink()
    with pytest.raises(OSError, match="lacks images.json: copy the whole folder of the cell"):
        gather(lab[1], [elsewhere])
    assert not cell.folder(lab[1]).exists()


def test_only_labs_and_cells_of_the_lab_are_gathered(lab, tmp_path):
    with pytest.raises(OSError, match="photos is not the folder of a lab"):
        gather(lab[1], [tmp_path / "photos"])
    shutil.copytree(lab[1], tmp_path / "elsewhere")
    write_lab_file(lab[1] / LAB_FILE, dataclasses.replace(lab[0], structures={"full": 1, "lora": 1}))
    with pytest.raises(ValueError, match=r"genieblue-skip, mixed, seed 0\) that .*lab.yaml lacks"):
        gather(lab[1], [tmp_path / "elsewhere"])


def test_the_report_has_a_row_for_each_structure_and_says_what_was_not_run(finished):
    text = write_report(finished[1], finished[1].parent / "report").read_text()
    for name in STRUCTURES:
        assert f"\n| {name} | " in text
    assert "lack a structure that has not been run" in text
    assert len(list((finished[1].parent / "report").glob("*.png"))) == 3


def test_a_report_leaves_what_else_is_in_its_folder_and_replaces_no_other_file(finished, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(finished[1], tmp_path)
    write_report(finished[1], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "report.md").write_text("# My own")
    with pytest.raises(ValueError, match="is not a report of a lab"):
        write_report(finished[1], tmp_path)
    assert (tmp_path / "report.md").read_text() == "# My own"
    (other := tmp_path / "other").mkdir()
    (other / "loss.png").write_text("mine")
    with pytest.raises(ValueError, match="loss.png is there"):
        write_report(finished[1], other)
    assert [path.read_text() for path in other.iterdir()] == ["mine"]


def test_a_report_that_was_killed_is_written_again(finished, tmp_path, monkeypatch):
    written = []

    def killed(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        staging.write_whole(path, content)

    with monkeypatch.context() as ended:
        ended.setattr(report, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(finished[1], tmp_path)
    assert [path.name for path in written] == ["report.md"]
    write_report(finished[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "scores.png", "loss.png", "retained.png"}


def test_results_of_one_structure_differ_from_itself_by_nothing(finished):
    results = LabResults(finished[1])
    group = results.get("lora")
    assert group is not None and group.seeds == (0, 1)
    difference = results.difference(group.images, group.images)
    assert difference.value == 0 and results.retention(group.images, group.images).value in (100, pytest.approx(100))
