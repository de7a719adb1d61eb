"""`genieblue quantize`: the recipe from options, the result as a table or JSON."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.options import (
    Activations,
    BaseCode,
    CalibrationImages,
    EightBits,
    GroupSize,
    Json,
    Revision,
    Rounding,
    UnquantizedModel,
    Weights,
    check_not_empty,
    check_picture,
    load_processor,
    loading_options,
    read_bytes,
)
from genieblue.cli.terminal import (
    ended_by_sigterm,
    looking_for,
    note,
    print_json,
    print_table,
    progress_bar,
    quiet_transformers,
    stdout_for_json,
)
from genieblue.cli.verdict import (
    AcceptLoss,
    EvalData,
    EvalMetric,
    MaxAnswerLoss,
    MaxPerplexityRatio,
    open_held_out,
    show_verdict,
)
from hub_cards.short_numbers import bits_each, short_bytes


def quantize(
    model: UnquantizedModel,
    out: Annotated[Path, typer.Option(help="Folder for the quantized GenieBlue.")],
    llm: Annotated[Weights, typer.Option(help="Linear layers of the base and of the replicated blocks.")] = "w4a16",
    replicated: Annotated[
        Weights | None, typer.Option(help="Linear layers of the replicated blocks; default: as --llm.")
    ] = None,
    lora: Annotated[EightBits, typer.Option(help="LoRA.")] = "w8a16",
    vision: Annotated[
        Weights | None, typer.Option(help="Vision tower; default: w8a16. That of a VLM stays w16a16.")
    ] = None,
    projector: Annotated[
        Weights | None, typer.Option(help="Projector; default: w8a16. That of a VLM stays w16a16.")
    ] = None,
    lm_head: Annotated[EightBits, typer.Option(help="LM head.")] = "w16a16",
    embeddings: Annotated[EightBits, typer.Option(help="Embeddings.")] = "w16a16",
    rounding: Annotated[Rounding | None, typer.Option(help="Default: gptq with --calibration, else mse.")] = None,
    group_size: Annotated[
        GroupSize | None, typer.Option(help="4-bit weights that share one scale; default: 64, mixed if calibrated.")
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Mixed precision of the blocks on average; default: as much as groups of 64, 4.38."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(parser=read_bytes, metavar="SIZE", help="The same by the size of all weights, such as 1.9GB."),
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file for the formats that mixed precision chooses.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Chats, or plain text (.txt, .md); may be repeated.")
    ] = None,
    image_folder: CalibrationImages = None,
    samples: Annotated[int, typer.Option(min=1, help="Maximum calibration samples of each kind.")] = 64,
    sample_length: Annotated[int, typer.Option(min=8, help="Tokens per calibration text.")] = 512,
    eval_data: EvalData = None,
    metric: EvalMetric = None,
    max_answer_loss: MaxAnswerLoss = None,
    max_perplexity_ratio: MaxPerplexityRatio = None,
    accept_loss: AcceptLoss = False,
    activations: Annotated[
        Activations, typer.Option(help="Dtype of activations and unquantized weights.")
    ] = "bfloat16",
    base_out: Annotated[
        Path | None, typer.Option(help="Folder for the quantized base; default: next to --out.")
    ] = None,
    quantized_base: Annotated[
        str | None, typer.Option(help="An already quantized base to reuse.", callback=check_not_empty)
    ] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Store the quantized base in --out, in the folder `base`.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output folders.")] = False,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Quantize a GenieBlue and its base, for a CPU, a GPU or the Hub.

    The default is the paper's recipe for phones: LLM W4A16; vision tower, projector and LoRA W8A16. The quantized base
    is a separate repository, which any number of adapters and plain users can share.

    With --calibration, the damage that 4 bits do to each linear is measured in both views, and some have 8 bits or
    smaller groups. With --eval-data it ends with a verdict: answers and perplexity against those in 16 bits. If too
    much is lost, the folder is written and marked, `push` refuses it, and the exit code is 1.
    """
    from conversion.quantization.mixed import Budget, draw
    from conversion.quantization.precision import QuantizationRecipe
    from conversion.quantization.quantize import quantize_genieblue
    from genieblue.data.calibration_chats import read_calibration
    from genieblue.data.plain_texts import is_plain_text
    from hub_cards.model_parts import model_info
    from modeling_genieblue import GenieBlueConfig

    chosen = rounding or ("gptq" if calibration else "mse")
    if calibration and chosen != "gptq":
        raise typer.BadParameter(f"{chosen} uses no calibration samples: leave out --calibration or use gptq.")
    if image_folder is not None and all(map(is_plain_text, calibration or ())):
        raise typer.BadParameter("--image-folder is for the images of chats: give some with --calibration.")
    budget = Budget(bits_per_weight, max_bytes)
    if budget != Budget() and group_size is not None:
        raise typer.BadParameter("Mixed precision chooses the groups too: leave out --group-size.")
    if budget != Budget() and not calibration:
        raise typer.BadParameter("Mixed precision is chosen by measured damage: give --calibration.")
    if not calibration or group_size is not None:
        budget = None
    if chart is not None and budget is None:
        raise typer.BadParameter("Without --calibration, or with --group-size, no formats are chosen to be drawn.")
    chart = None if chart is None else chart.expanduser()
    check_picture(chart, "--chart")
    options = loading_options(revision, trust_remote_code)
    with stdout_for_json(json_output), looking_for(model), ended_by_sigterm():
        quiet_transformers()
        recipe = QuantizationRecipe.for_config(
            GenieBlueConfig.from_pretrained(model, **options),
            llm=llm,
            replicated_blocks=replicated,
            lora=lora,
            vision_tower=vision,
            multi_modal_projector=projector,
            lm_head=lm_head,
            embeddings=embeddings,
            rounding=chosen,
            group_size=int(group_size or 64),
            activations=activations,
        )
        held_out = open_held_out(eval_data, model, options, metric, max_answer_loss, max_perplexity_ratio, accept_loss)
        data = None
        if calibration:
            processor = load_processor(model, options)
            data = read_calibration(
                calibration, processor, count=samples, length=sample_length, image_folder=image_folder
            )
            if held_out is not None:
                held_out.compare_with_calibration(calibration, image_folder)
        report = quantize_genieblue(
            model,
            out,
            recipe,
            base_output=base_out,
            quantized_base=quantized_base,
            self_contained=self_contained,
            samples=data,
            held_out=held_out,
            accept_loss=accept_loss,
            budget=budget,
            overwrite=overwrite,
            progress=progress_bar,
            **options,
        )
        info = model_info(report.output)
    sizes = {name: size for name, size in info.parts.items() if size is not None}
    precisions = info.precisions
    if json_output:
        _print_json_report(report, sizes, precisions)
    else:
        _print_report(report, sizes, precisions, recipe.activations)
    if chart is not None and report.mixed:
        draw(report.mixed, chart)
    elif chart is not None:
        note(f"No linear of the blocks has 4 bits, so no formats were chosen, and {chart} was not drawn.")
    if not report.verdict["accepted"]:
        from conversion.quantization.remedy import what_loses_less

        note(
            f"{out} is marked as failed, and `push` refuses it. Less is lost with "
            f"{what_loses_less(report.verdict, recipe, report.mixed, report.on_reused_base)}; `push --accept-loss` "
            "publishes it nevertheless."
        )
        raise typer.Exit(1)
    if not json_output:
        note(f"Next: genieblue chat {out} --image photo.jpg; genieblue verify {out}")


def _print_json_report(report: Any, sizes: dict[str, Any], precisions: dict[str, str]) -> None:
    parts = {
        name: {"precision": precisions[name], "parameters": size.parameters, "bytes": size.bytes}
        for name, size in sizes.items()
    }
    print_json(
        {
            "output": str(report.output),
            "base": report.base,
            "parts": parts,
            "errors": report.errors,
            "other_precision": report.other_precision,
            "verdict": report.verdict,
            **({"mixed": [linear.as_json() for linear in report.mixed]} if report.mixed else {}),
        }
    )


def _print_report(report: Any, sizes: dict[str, Any], precisions: dict[str, str], activations: str) -> None:
    rows = [
        (
            name,
            precisions[name],
            f"{size.parameters:,}",
            short_bytes(size.bytes),
            bits_each(size.parameters, size.bytes),
        )
        for name, size in sizes.items()
    ]
    print_table(("part", "precision", "parameters", "on disk", "bits per parameter"), rows)
    if report.mixed:
        _print_mixed(report.mixed)
    if "vlm" in sizes:
        note("The VLM's vision side and connector, and its own norms, biases and rows of embedding and head, stay at "
             "16 bits.")  # fmt: skip
    for name, reason in report.other_precision.items():
        note(f"{name}: {reason}")
    for view, error in report.errors.items():
        typer.echo(f"Error of the {view} view's logits against {activations}: {error:.3f} (relative L2)")
    show_verdict(report.verdict)
    typer.echo(f"{report.output}, on the base {report.base}")


def _print_mixed(linears: list[Any]) -> None:
    """One row for each kind of linear: how many have which format, and the damage in nats per token."""
    from conversion.quantization.mixed import bits_per_weight
    from conversion.quantization.precision import FORMATS

    by_kind: dict[str, list[Any]] = {}
    for linear in linears:
        by_kind.setdefault(linear.kind + (", replicated" if linear.is_replicated else ""), []).append(linear)
    rows = [
        (
            title,
            *(str(sum(linear.format == one for linear in own) or "") for one in FORMATS),
            f"{bits_per_weight(own):.2f}",
            f"{sum(linear.damages[0] for linear in own):.2g}",
            f"{sum(linear.damages[linear.chosen] for linear in own):.2g}",
        )
        for title, own in {**by_kind, "all": linears}.items()
    ]
    print_table(("linears", *FORMATS, "bits per weight", "damage at the smallest", "damage left"), rows)
