"""The verdict on a quantized model on the command line: its options, and how it is printed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from conversion.verdict import Limits, warn_of_loss
from genieblue.cli.options import Metric, load_processor
from genieblue.cli.terminal import print_table
from hub_cards.verdicts import answer_error, summary

EvalData = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", help="Held-out chats as for `eval`, or a .txt or .md file; may be repeated."),
]
EvalMetric = Annotated[
    Metric | None,
    typer.Option(help="For held-out chats that name none; default: choice with `choices`, else exact."),
]
MaxAnswerLoss = Annotated[
    float | None,
    typer.Option(
        help=f"Points that the answers of a view may lose; default: {Limits.answer_loss:g}, or as recorded (`verify`)."
    ),
]
MaxPerplexityRatio = Annotated[
    float | None,
    typer.Option(
        help=f"Most times the perplexity in 16 bits; default: {Limits.perplexity_ratio:g}, or as recorded (`verify`)."
    ),
]
AcceptLoss = Annotated[
    bool, typer.Option("--accept-loss", help="Exit with 0, and allow `push`, even if the verdict is that it failed.")
]


def open_held_out(
    eval_data: Sequence[str] | None, model: str, options: Mapping[str, Any], metric: str | None,
    max_answer_loss: float | None, max_perplexity_ratio: float | None, accept_loss: bool = False,
) -> Any:  # fmt: skip
    """A `HeldOutData` for `model`, or `None` without data; `BadParameter` for options that need some.

    Limits that are not given are those of a verdict that `model` records, if any.
    """
    given = {"--metric": metric, "--max-answer-loss": max_answer_loss, "--max-perplexity-ratio": max_perplexity_ratio}
    if not eval_data:
        for name in [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter("It is about held-out data: give some with --eval-data.", param_hint=name)
        return None
    from genieblue.data.plain_texts import is_plain_text
    from genieblue.evaluation.held_out import HeldOutData
    from modeling_genieblue import GenieBlueConfig

    about_answers = [name for name in ("--metric", "--max-answer-loss") if given[name] is not None]
    if about_answers and all(map(is_plain_text, eval_data)):
        raise typer.BadParameter(
            "It is about answers to chats, and --eval-data has only texts: give chats too, or leave it out.",
            param_hint=about_answers[0],
        )
    quantization = getattr(GenieBlueConfig.from_pretrained(model, **options), "quantization", None) or {}
    recorded = (quantization.get("verdict") or {}).get("limits") or {}
    limits = {"answer_loss": max_answer_loss, "perplexity_ratio": max_perplexity_ratio}
    limits = {name: recorded.get(name) if value is None else value for name, value in limits.items()}
    limits = Limits(**{name: value for name, value in limits.items() if value is not None})
    return HeldOutData(
        eval_data, load_processor(model, options), metric=metric, limits=limits, accept_loss=accept_loss
    )


def warn_of_failure(name: str, quantization: Mapping[str, Any] | None) -> None:
    """Warns that what is opened to answer lost too much when it was quantized, unless that was accepted.

    `quantization` are the settings of a quantized model, or a bundle's metadata; `None` for a model in 16 bits.
    """
    warn_of_loss(name, quantization, "Expect worse answers than in 16 bits, or quantize it less.")


def show_verdict(verdict: Mapping[str, Any]) -> None:
    """Prints the tables of a verdict, and the verdict itself."""
    views = verdict.get("views", {})
    answers = [
        (
            view, each["task"], each["metric"], f"{100 * each['first']:.1f} %", f"{100 * each['second']:.1f} %",
            f"{100 * each['difference']:+.1f}", f"{answer_error(each):.1f}", str(each["better"]), str(each["worse"]),
            str(each["count"]),
        )
        for view, found in views.items()
        for each in found["answers"]
    ]  # fmt: skip
    if answers:
        typer.echo()
        columns = "16 bits", "quantized", "points", "± s.e.", "better", "worse", "samples"
        print_table(("answers", "task", "metric", *columns), answers)
    perplexities = [
        (f"{each['of']}, {view} view", f"{each['before']:.3f}", f"{each['after']:.3f}", f"{each['ratio']:.3f}",
         "" if each["error"] is None else f"{each['ratio'] * each['error']:.3f}", str(each["tokens"]))
        for view, found in views.items()
        for each in found["perplexity"]
    ]  # fmt: skip
    if perplexities:
        typer.echo()
        print_table(("perplexity", "16 bits", "quantized", "ratio", "± s.e.", "tokens"), perplexities)
    if by_part := verdict.get("error_by_part"):
        typer.echo()
        rows = [(part, *(f"{errors[view]:.3f}" if errors.get(view) else "–" for view in views))
                for part, errors in by_part.items()]  # fmt: skip
        print_table(("error of the logits with only this part rounded", *(f"{view} view" for view in views)), rows)
    typer.echo()
    typer.secho(f"Verdict: {summary(verdict)}.", bold=True, fg=None if verdict["accepted"] else "red")
