"""What a lab's numbers say: averages, paired differences, seeds, and verdicts that can also be no."""

import itertools
import json
import math

import numpy as np
import pytest
from tiny_lab import write_lab_values

from genieblue.lab import paper
from genieblue.lab.cells import BASE_TEXTS, IMAGES, LAB_FILE, RESULT, TEXTS, Cell
from genieblue.lab.lab_file import read_lab_file, write_lab_file
from genieblue.lab.observations import FAILS, HOLDS, NOT_RUN, UNDECIDED, judge, verdict_on
from genieblue.lab.report import write_report
from genieblue.lab.results import Estimate, LabResults, retention

QUESTIONS = 200
PAPER = {name: average for name, (_, average, _) in paper.IMAGES["BlueLM-3B"].items()}


def of_values(values):
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"score": float(np.mean(values)), "standard_error": error, "count": len(values), "values": list(values)}


@pytest.fixture
def make_lab(tmp_path):
    """Writes a lab whose cells have given averages on images and texts, by structure; returns its folder."""

    def make(images, texts, seeds=2, spread=0.0, questions=QUESTIONS, shares=None):
        shares = shares or {"mixed": 0.3}
        folder = tmp_path / "out"
        folder.mkdir()
        lab = read_lab_file(write_lab_values(tmp_path / "file", structures=list(images), seeds=seeds, data=shares))
        write_lab_file(folder / LAB_FILE, lab)
        rng = np.random.default_rng(0)
        hard = {task: rng.normal(0, 15, questions) for task in ("digits", "naming", "facts")}  # of each question

        def values(task, average, shift):
            return of_values((average + shift + hard[task] - hard[task].mean()).tolist())

        (folder / BASE_TEXTS).write_text(json.dumps({"facts": values("facts", texts["base"], 0)}))
        for name in images:
            for data, seed in itertools.product(shares, range(seeds)):
                place = Cell(data, name, seed).folder(folder)
                place.mkdir(parents=True)
                average = images[name] if data == next(iter(shares)) else 100 - images[name]
                shift = spread * (seed - (seeds - 1) / 2)
                of_images = {task: values(task, average, shift) for task in ("digits", "naming")}
                of_texts = {"facts": values("facts", texts.get(name, 40), shift)}
                for file, scores in ((IMAGES, of_images), (TEXTS, of_texts)):
                    (place / file).write_text(json.dumps(scores))
                result = {
                    "trainable": 10**6, "copied_blocks": [3] if "-" in name else [], "average": average, "steps": 2,
                    "images": of_images, "texts": of_texts, "seconds_per_step": 0.1, "peak_memory_gb": 1.0,
                    "losses": [[step, 1 / step] for step in range(1, 9)],
                }  # fmt: skip
                (place / RESULT).write_text(json.dumps(result))
        return folder

    return make


TEXT_AVERAGES = {name: average for name, (average, _) in paper.TEXTS.items()}


def test_numbers_like_the_papers_confirm_all_it_says_but_for_equal_ones(make_lab):
    verdicts = judge(LabResults(make_lab(PAPER, TEXT_AVERAGES)))
    assert [verdict.verdict for verdict in verdicts] == [HOLDS] * 7


def test_numbers_the_other_way_round_deny_it(make_lab):
    images = {name: 100 - average for name, average in PAPER.items()}
    texts = {name: 100 - average for name, average in TEXT_AVERAGES.items()}
    verdicts = judge(LabResults(make_lab(images, texts)))
    assert [verdict.verdict for verdict in verdicts] == [FAILS] * 7


def test_equal_numbers_decide_nothing(make_lab):
    results = LabResults(make_lab(dict.fromkeys(PAPER, 50.0), dict.fromkeys(TEXT_AVERAGES, 50.0), spread=1.0))
    assert {verdict.verdict for verdict in judge(results)} == {UNDECIDED}


def test_seeds_that_differ_by_more_than_structures_decide_nothing(make_lab):
    results = LabResults(make_lab(PAPER, TEXT_AVERAGES, spread=30.0))
    assert {verdict.verdict for verdict in judge(results)} == {UNDECIDED}


def test_an_observation_without_its_structures_is_not_judged(make_lab):
    verdicts = judge(LabResults(make_lab({"full": 60.0, "lora": 55.0}, {"base": 60.0, "full": 50.0, "lora": 55.0})))
    assert [verdict.verdict for verdict in verdicts] == [HOLDS, HOLDS, HOLDS, *[NOT_RUN] * 4]


def test_a_difference_is_paired_by_question(make_lab):
    results = LabResults(make_lab({"full": 60.0, "lora": 55.0}, {"base": 50.0}))
    full, lora = results.get("full"), results.get("lora")
    assert full is not None and lora is not None
    difference = results.difference(lora.images, full.images)
    assert difference.value == pytest.approx(5) and difference.error == pytest.approx(0, abs=1e-6)
    assert results.average(full.images).error == pytest.approx(15 / math.sqrt(2 * QUESTIONS), rel=0.1)
    assert results.retention(full.images, lora.images).value == pytest.approx(100 * 55 / 60)


def test_a_share_of_a_reference_that_varies_is_as_uncertain_as_their_ratio():
    rng = np.random.default_rng(3)
    reference = rng.normal(50, 20, 400)
    half = 0.5 * reference + rng.normal(0, 1, 400)
    found = retention(({"a": reference.tolist()},), ({"a": half.tolist()},))
    drawn = [rng.integers(400, size=400) for _ in range(2000)]
    ratios = [100 * half[places].mean() / reference[places].mean() for places in drawn]
    assert found.value == pytest.approx(100 * half.mean() / reference.mean())
    assert found.error == pytest.approx(np.std(ratios), rel=0.1)
    assert math.isnan(retention(({"a": [0.0, 0.0]},), ({"a": [1.0, 2.0]},)).value)


def test_seeds_add_to_the_error_as_their_spread_says(make_lab):
    results = LabResults(make_lab({"full": 60.0, "lora": 55.0}, {"base": 50.0}, seeds=2, spread=4.0))
    full, lora = results.get("full"), results.get("lora")
    assert full is not None and lora is not None
    spread = math.sqrt(8.0)  # of two runs that are 4 apart
    assert results.difference(lora.images, full.images).error == pytest.approx(spread, rel=1e-6)
    assert results.decisive == pytest.approx(4.30, abs=0.01)  # two degrees of freedom


def test_a_difference_has_the_digits_that_its_error_needs():
    assert Estimate(-0.00061, 0.00012).as_difference() == "-0.0006 ± 0.0001"
    assert Estimate(12.345, 0.06).as_difference() == "+12.3 ± 0.1"
    assert Estimate(12.345, 0.0).as_difference() == "+12.3 ± 0.0" and Estimate(1.0, None).as_difference() == "+1.0"


def test_a_difference_without_an_error_decides_nothing():
    assert verdict_on([Estimate(5.0, None)], 2.0) == UNDECIDED
    assert verdict_on([Estimate(5.0, 1.0), Estimate(-5.0, 1.0)], 2.0) == FAILS
    assert verdict_on([Estimate(5.0, 1.0), Estimate(1.0, 1.0)], 2.0) == UNDECIDED


def test_one_seed_of_each_structure_decides_nothing_and_the_report_says_why(make_lab):
    folder = make_lab(PAPER, TEXT_AVERAGES, seeds=1)
    assert {verdict.verdict for verdict in judge(LabResults(folder))} == {UNDECIDED}
    assert "no difference decides anything" in write_report(folder).read_text()


def test_the_report_has_the_papers_tables_beside_the_labs(make_lab):
    text = write_report(make_lab(PAPER, TEXT_AVERAGES)).read_text()
    assert "Of the paper's 7 observations, 7 hold here, 0 do not, and 0 are undecided" in text
    row = next(line for line in text.splitlines() if line.startswith("| genieblue-skip | 1.00 |"))
    assert "| 99.0 ± 0.0 | 2 | 98.99 (65.52; 1005.73 M) | 97.76 (63.26; 1146.79 M) |" in row
    assert "| full | 47.0" in text and "78.18 (47.03)" in text


def test_each_kind_of_data_has_its_tables_plots_and_verdicts(make_lab):
    path = write_report(make_lab(PAPER, TEXT_AVERAGES, shares={"plain": 0.0, "mixed": 0.3}))
    text = path.read_text()
    for_plain, for_mixed = text.split("## What the numbers say, data `mixed`")
    assert "3 | LoRA alone falls behind full fine-tuning on images (91.82 %). | **holds**" in for_plain
    assert "3 | LoRA alone falls behind full fine-tuning on images (91.82 %). | **does not hold**" in for_mixed
    table = text.split("(table 3)")[1].split("##")[0]
    assert "| lora | 0% | 56.3" in table and "| lora | 30% | 56.3" in table and "| base |  | 60.2" in table
    assert {plot.name for plot in path.parent.glob("*.png")} == {
        f"{name}{of_data}.png" for name in ("scores", "loss", "retained") for of_data in ("", "-mixed")
    }
    assert all(f"({plot.name})" in text for plot in path.parent.glob("*.png"))
    assert "\n| genieblue-skip, `mixed` | 2 | 0.10 |" in text.split("## Cost")[1]


def test_one_kind_of_data_leaves_what_texts_change_unmeasured(make_lab):
    text = write_report(make_lab(PAPER, TEXT_AVERAGES)).read_text()
    assert "one kind of data, so that what a share of texts changes was not measured" in text


def test_answers_that_are_equal_to_the_end_are_counted_apart(make_lab):
    folder = make_lab({"full": 60.0}, {"base": 50.0}, seeds=1)
    place = Cell("mixed", "full", 0).folder(folder)
    for path in (folder / BASE_TEXTS, place / TEXTS, place / RESULT):
        content = json.loads(path.read_text())
        of_texts = content["texts"] if path.name == RESULT else content
        of_texts["mt_bench"] = of_values([100.0, 20.0, 100.0, 0.0]) | {"equal_answers": 0.5}
        path.write_text(json.dumps(content))
    text = write_report(folder).read_text()
    assert "| MT-bench, as base | MT-bench, equal | average |" in text
    assert "| 50.0 ± 28.9 |" in next(line for line in text.splitlines() if line.startswith("| full | 40.0"))


def test_a_single_question_has_no_error_and_decides_nothing(make_lab):
    results = LabResults(make_lab(PAPER, TEXT_AVERAGES, questions=1))
    assert {verdict.verdict for verdict in judge(results)} == {UNDECIDED}
    full = results.get("full")
    assert full is not None and results.average(full.images).error is None


def test_one_run_of_a_structure_takes_the_spread_of_seeds_of_the_others(make_lab):
    folder = make_lab({"full": 60.0, "lora": 55.0}, {"base": 50.0}, seeds=2, spread=4.0)
    (Cell("mixed", "lora", 1).folder(folder) / RESULT).unlink()
    results = LabResults(folder)
    lora = results.get("lora")
    assert lora is not None and lora.seeds == (0,)
    sampling = 15 / math.sqrt(QUESTIONS)
    assert results.average(lora.images.of_task("digits")).error == pytest.approx(math.hypot(sampling, 8**0.5), rel=0.1)


def test_a_lab_without_text_tasks_is_not_judged_on_texts(make_lab):
    folder = make_lab(PAPER, TEXT_AVERAGES)
    for path in (folder / BASE_TEXTS, *folder.rglob(TEXTS)):
        path.write_text("{}")
    verdicts = [verdict.verdict for verdict in judge(LabResults(folder))]
    assert verdicts == [NOT_RUN, NOT_RUN, HOLDS, HOLDS, HOLDS, HOLDS, NOT_RUN]
    assert "3 lack a structure that has not been run, or text tasks." in write_report(folder).read_text()


def test_a_lab_without_a_finished_cell_has_no_report(tmp_path):
    with pytest.raises(OSError, match="not the folder of a lab"):
        write_report(tmp_path)
    write_lab_file(tmp_path / LAB_FILE, read_lab_file(write_lab_values(tmp_path / "file")))
    with pytest.raises(ValueError, match="No cell of .* is done"):
        write_report(tmp_path)
