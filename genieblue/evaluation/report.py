"""What an evaluation leaves behind: scores, answers, a sheet of wrong ones, rows for the card and the Hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from conversion.staging import check_can_be_made
from genieblue.evaluation.answer_sheet import SheetEntry, draw_answer_sheet
from genieblue.evaluation.evaluate import Difference, Evaluation, Score
from genieblue.evaluation.samples import NO_TASK, EvaluationDataset
from hub_cards.model_card import card_info_from_folder, is_as_generated, write_model_card
from modeling_genieblue.model_files_genieblue import CARD_NAME, EVAL_RESULTS, MEASUREMENTS_NAME
from modeling_genieblue.staging_genieblue import NewFolder

SUMMARY, ANSWERS, WRONG, SHEET = "evaluation.json", "answers.jsonl", "wrong.jsonl", "wrong.png"
OURS = (SUMMARY, ANSWERS, WRONG, SHEET, EVAL_RESULTS, MEASUREMENTS_NAME)
SHOWN = 48  # wrong answers on the sheet


def write_report(
    out: str | Path,
    evaluation: Evaluation,
    dataset: EvaluationDataset,
    image_processor: Any,
    *,
    name: str,
    settings: Mapping[str, Any],
    differences: Sequence[Difference] = (),
) -> None:
    """Writes a folder with all results; files in it from an earlier report are replaced, others stay.

    Args:
        name: of the data, in the card's rows and in the Hub's file.
        settings: how it was measured, recorded in the summary.
        differences: to another model, if it was compared.
    """
    out = Path(out)
    check_report_folder(out)
    scores = evaluation.scores()
    summary = {"data": name, "sha256 of the data": dataset.sha256, "date": date.today().isoformat(), **settings}
    summary["scores"] = [asdict(score) for score in scores]
    if differences:
        summary["differences"] = [asdict(difference) for difference in differences]
    with NewFolder(out, "evaluation") as new:
        folder = new.staging
        _write_json(folder / SUMMARY, summary)
        _write_lines(folder / ANSWERS, [asdict(answer) for answer in evaluation.answers])
        _write_lines(folder / WRONG, [asdict(answer) for _, answer in evaluation.wrong])
        _write_json(folder / MEASUREMENTS_NAME, _card_rows(scores, name, settings))
        _write_eval_results(folder, scores, name, settings)
        if evaluation.wrong:
            _draw_wrong_answers(folder / SHEET, evaluation, dataset, image_processor, name)
        new.put_in_place(lambda old: [path.relative_to(old) for path in old.iterdir() if path.name not in OURS])


def check_report_folder(out: Path) -> None:
    """`ValueError` for a folder of something else, such as a model; `OSError` where none can be."""
    check_can_be_made(out)
    if out.is_dir() and any(out.iterdir()) and not (out / SUMMARY).is_file():
        raise ValueError(f"{out} contains something other than an evaluation: give a new or empty folder.")


def _draw_wrong_answers(
    path: Path, evaluation: Evaluation, dataset: EvaluationDataset, image_processor: Any, name: str
) -> None:
    """Writes a PNG of the first wrong answers."""
    wrong = evaluation.wrong
    entries = [
        SheetEntry(dataset[place].images, answer.question, answer.answer, " | ".join(answer.references), right=False)
        for place, answer in wrong[:SHOWN]
    ]
    shown = f", the first {SHOWN} of them here" if len(wrong) > SHOWN else ""
    note = f"{len(wrong)} of {len(evaluation.answers)} answers are not fully right{shown}"
    draw_answer_sheet(path, f"Wrong answers, {name}", note, entries, image_processor)


def _card_rows(scores: Sequence[Score], name: str, settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of `measurements.json` for the model card."""
    rows = []
    for score in scores:
        error = "" if score.standard_error is None else f" ± {100 * score.standard_error:.1f}"
        task = "" if score.task == NO_TASK else f", {score.task}"
        how = f"{score.count} samples, greedy, at most {settings['max_new_tokens']} new tokens; ± one standard error"
        rows.append({"name": f"{name}{task}: {score.metric}", "value": f"{100 * score.mean:.1f}{error} %", "how": how})
    return rows


def record_in_model(model: str | Path, report: str | Path) -> None:
    """Adds a report's rows and its results for the Hub to a model's folder, and renders its card again.

    Rows of the same name are replaced. A card that was edited stays as it is.
    """
    model, report = Path(model), Path(report)
    add_measurements(model, json.loads((report / MEASUREMENTS_NAME).read_text(encoding="utf-8")))
    (model / EVAL_RESULTS).mkdir(exist_ok=True)
    for file in (report / EVAL_RESULTS).glob("*.yaml"):
        (model / EVAL_RESULTS / file.name).write_bytes(file.read_bytes())


def add_measurements(model: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Adds rows to a model's `measurements.json`, replacing those of the same name, and renders its card again."""
    path = model / MEASUREMENTS_NAME
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    names = {row["name"] for row in rows}
    _write_json(path, [*(row for row in old if row["name"] not in names), *rows])
    card = model / CARD_NAME
    if card.is_file() and is_as_generated(card.read_text(encoding="utf-8")):
        card.unlink()
    write_model_card(model, card_info_from_folder(model))


def _write_eval_results(folder: Path, scores: Sequence[Score], name: str, settings: Mapping[str, Any]) -> None:
    notes = f"{settings['precision']}, greedy; genieblue eval"
    entries = [
        EvalResultEntry(
            dataset_id=str(settings["dataset_id"]),
            task_id="default" if score.task == NO_TASK else score.task,
            value=round(100 * score.mean, 2),
            date=date.today().isoformat(),
            notes=f"{score.metric}, {score.count} samples; {notes}",
        )
        for score in scores
    ]
    (folder / EVAL_RESULTS).mkdir()
    path = folder / EVAL_RESULTS / f"{Path(name).name}.yaml"
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
