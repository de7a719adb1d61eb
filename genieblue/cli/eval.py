"""`genieblue eval`: score a model's answers on held-out data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.chat import load_chat
from genieblue.cli.options import (
    Base,
    BaseCode,
    Device,
    Dtype,
    FollowLinks,
    ImageFolder,
    ImageRoots,
    Json,
    Metric,
    NpuBackend,
    Revision,
    View,
    check_unused_options,
    was_given,
)
from genieblue.cli.qnn import is_bundle, open_bundle
from genieblue.cli.terminal import choose_device, note, print_json, print_table, quiet_transformers, stdout_for_json


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a GenieBlue, or a bundle from `export qnn`.")],
    data: Annotated[str, typer.Option(help="Chats: a file, folder, glob or hf:you/set[test], as for `train`.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for all answers, wrong ones as a sheet, and scores."),
    ] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(help="For samples that name none; default: choice with `choices`, else exact."),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another model or bundle, on the same samples.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add the scores to the model's card. Needs --out.")] = False,
    dataset_id: Annotated[str | None, typer.Option(help="The data's id on the Hub, for .eval_results.")] = None,
    image_folder: ImageFolder = None,
    image_root: ImageRoots = None,
    follow_links: FollowLinks = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 64,
    view: Annotated[View | None, typer.Option(help="View for samples without images; default: text.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip bad samples instead of stopping.")] = False,
    npu: Annotated[NpuBackend, typer.Option(help="Where to run a bundle's graphs.")] = "cpu",
    adapter: Annotated[
        Path | None, typer.Option(help="File from `export adapter`, to replace the bundle's own LoRA.")
    ] = None,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Score a model's answers on held-out data.

    Scores are by task, with standard errors. Answers are greedy. Samples with images run the multimodal view, others
    the text view. Each sample may name its `answers`, `choices`, `metric` and `task`.
    """
    _check_options(ctx, model, compare, out, record)
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.data.image_folders import read_image_roots
        from genieblue.evaluation.evaluate import compare as differences_of
        from genieblue.evaluation.evaluate import evaluate as run
        from genieblue.evaluation.report import check_report_folder, record_in_model, write_report
        from genieblue.evaluation.samples import EvaluationDataset

        if out is not None:
            check_report_folder(out)
        dataset = EvaluationDataset(
            data,
            metric=metric,
            image_folder=image_folder,
            image_roots=read_image_roots(image_root or ()),
            follow_links=follow_links,
            skip_bad=skip_bad,
        ).first(limit)
        name = Path(data).stem

        def answers_of(answering: str) -> tuple[Any, Any]:
            answerer = _open(
                answering, base, revision, dtype, device, trust_remote_code, npu, adapter, batch_size, view
            )
            return answerer, run(answerer, dataset, max_new_tokens=max_new_tokens)

        answerer, evaluation = answers_of(model)
        differences = [] if compare is None else differences_of(evaluation, answers_of(compare)[1])
        settings = {
            "model": Path(model).name, "compared with": None if compare is None else Path(compare).name,
            "max_new_tokens": max_new_tokens, "batch_size": answerer.batch_size, "precision": answerer.precision,
            "view of texts": view or "text", "dataset_id": dataset_id or name,
        }  # fmt: skip
        if out is not None:
            write_report(
                out, evaluation, dataset, getattr(answerer.processor, "image_processor", None), name=name,
                settings=settings, differences=differences,
            )  # fmt: skip
        if record and out is not None:
            record_in_model(model, out)
    _show(evaluation, differences, settings, json_output)
    if out is not None:
        note(f"All answers and a sheet of the wrong ones: {out}")


def _check_options(ctx: typer.Context, model: str, compare: str | None, out: Path | None, record: bool) -> None:
    """`BadParameter` for options that do not go together."""
    bundles = [name for name in (model, compare) if name is not None and is_bundle(name)]
    if len(bundles) == (1 if compare is None else 2):
        options = ("base", "revision", "dtype", "device", "trust_remote_code", "batch_size", "view")
        check_unused_options(ctx, options, "a bundle, which is fixed when it is compiled")
    if not bundles:
        check_unused_options(ctx, ("npu", "adapter"), "a model, only to a bundle")
    if len(bundles) == 2 and was_given(ctx, "adapter"):
        raise typer.BadParameter("An adapter is for one bundle: compare it with a model.", param_hint="--adapter")
    if record and out is None:
        raise typer.BadParameter("The scores are taken from the report: give --out.", param_hint="--record")
    if record and not Path(model).is_dir():
        raise typer.BadParameter(f"{model} is not a local folder, whose card can be written.", param_hint="--record")
    if record and bundles:
        raise typer.BadParameter("A bundle has no card: record the scores of a model.", param_hint="--record")


def _open(
    name: str, base: str | None, revision: str | None, dtype: Any, device: str | None, trust_remote_code: bool,
    npu: NpuBackend, adapter: Path | None, batch_size: int, view: View | None,
) -> Any:  # fmt: skip
    if is_bundle(name):
        from genieblue.evaluation.qnn_answering import BundleAnswerer

        return BundleAnswerer(open_bundle(name, npu, adapter).runner)
    from conversion.cpu_threads import warn_of_threads
    from genieblue.evaluation.answering import answerer_of

    chat = load_chat(name, base, revision, dtype, choose_device(device), trust_remote_code)
    if chat.model.device.type == "cpu":
        warn_of_threads()
    return answerer_of(chat.model, chat.processor, batch_size=batch_size, view=view)


def _show(evaluation: Any, differences: list[Any], settings: dict[str, Any], json_output: bool) -> None:
    from dataclasses import asdict

    scores = evaluation.scores()
    if json_output:
        document = {**settings, "scores": [asdict(score) for score in scores]}
        print_json(document | ({"differences": [asdict(each) for each in differences]} if differences else {}))
        return
    rows = [(score.task, score.metric, _percent(score.mean), _error(score), str(score.count)) for score in scores]
    print_table(("task", "metric", "score", "± s.e.", "samples"), rows)
    if differences:
        typer.echo()
        print_table(
            ("task", "metric", "first", "second", "difference", "± s.e.", "better", "worse"),
            [
                (each.task, each.metric, _percent(each.first), _percent(each.second),
                 f"{100 * each.difference:+.1f} %", _error(each), str(each.better), str(each.worse))
                for each in differences
            ],
        )  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _error(score: Any) -> str:
    return "" if score.standard_error is None else f"{100 * score.standard_error:.1f}"
