"""`genieblue train`: run one of the two training stages."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.chat import load_chat
from genieblue.cli.options import (
    Base,
    BaseCode,
    Dtype,
    FollowLinks,
    ImageFolder,
    ImageRoots,
    Json,
    Seed,
    check_not_empty,
    was_given,
)
from genieblue.cli.qnn import is_bundle
from genieblue.cli.terminal import is_main_process, looking_for, note, print_json, quiet_transformers, stdout_for_json
from hub_cards.short_numbers import counted


def train(
    ctx: typer.Context,
    stage: Annotated[
        int | None,
        typer.Option(min=1, max=2, help="1: projector only; 2: everything GenieBlue adds."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the GenieBlue to train.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE[:WEIGHT]",
            help="Chats: JSONL, Parquet, .tar, a folder or glob of these, or hf:you/set[train]; may be repeated.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained GenieBlue.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options; those given here win."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run will take, and stop.")] = False,
    text_share: Annotated[
        float | None,
        typer.Option(help="Share of samples without an image; default: as in the data."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out chats, as for `genieblue eval`.")] = None,
    eval_steps: Annotated[int | None, typer.Option(min=1, help="Steps between validations; default: a tenth.")] = None,
    eval_answers: Annotated[int, typer.Option(min=0, help="Validation samples that are also answered.")] = 32,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many validations without a lower loss."),
    ] = None,
    image_folder: ImageFolder = None,
    image_root: ImageRoots = None,
    follow_links: FollowLinks = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default: 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: the paper's.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum tokens per sample, including image tokens.")] = 4096,
    pack: Annotated[
        bool,
        typer.Option("--pack/--no-pack", help="Rows of many samples, up to --max-length; --batch-size counts rows."),
    ] = False,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of samples of similar length.")
    ] = False,
    max_tiles: Annotated[
        int | None,
        typer.Option(help="Maximum tiles per image; default: 1 in stage 1, the model's own in stage 2."),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="bfloat16 autocast; default: if the base is bfloat16."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory, about a third more time.")
    ] = False,
    cache_image_features: Annotated[
        bool,
        typer.Option("--cache-image-features", help="Compute each tile once, if the vision tower is frozen."),
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Several GPUs share what is trained instead of each having all of it.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: no checkpoints.")] = 500,
    keep_checkpoints: Annotated[int, typer.Option(min=1, help="How many of the last checkpoints to keep.")] = 2,
    logging_steps: Annotated[int, typer.Option(min=1, help="Steps between records in the log.")] = 10,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, trackio, wandb …; may be repeated."),
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of this machine, to estimate the cost.")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Data loading processes.")] = 0,
    seed: Seed = 42,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip bad samples instead of stopping.")] = False,
    base: Base = None,
    on_quantized: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Quantized base, or NPU bundle: train what makes up for its errors.",
            callback=check_not_empty,
        ),
    ] = None,
    dtype: Dtype = "auto",
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Run one of the two training stages; the base does not change.

    The run's folder, OUT-run, has its settings, log, curves and checkpoints.
    """
    values = _values(ctx, config)
    with stdout_for_json(json_output):
        quiet_transformers()
        document = _run(values, resume=resume, plan_only=plan)
    lines = document.pop("lines")
    if not is_main_process():
        return
    if json_output:
        print_json(document)
    else:
        typer.echo("\n".join(lines))


def _values(ctx: typer.Context, config: Path | None) -> dict[str, Any]:
    """A run's values: of the file, and over these the options that were given."""
    from genieblue.training.run_file import read_run_file

    unset = ("config", "plan", "resume", "json_output")
    given = {name: value for name, value in ctx.params.items() if name not in unset and was_given(ctx, name)}
    return {**({} if config is None else read_run_file(config)), **given}


def _run(values: dict[str, Any], *, resume: bool, plan_only: bool) -> dict[str, Any]:
    """Trains, or plans; returns what is printed."""
    from dataclasses import asdict

    from conversion.unchanged import check_unchanged
    from genieblue.data.image_folders import read_image_roots
    from genieblue.data.mixture import open_mixture
    from genieblue.evaluation.samples import EvaluationDataset
    from genieblue.training import stages
    from genieblue.training.plan import format_plan
    from genieblue.training.run_file import settings_of
    from genieblue.training.vlm_structure import structure_of

    settings = settings_of(values)
    out = Path(values["out"])
    stages.check_validates(settings, "eval_data" in values)
    stages.check_trackers(settings.report_to)
    stages.check_output(out.absolute())
    options = {
        "image_folder": values.get("image_folder"),
        "image_roots": read_image_roots(values.get("image_root") or ()),
        "follow_links": values.get("follow_links", False),
        "skip_bad": values.get("skip_bad", False),
    }
    chats = open_mixture(values["data"], text_share=values.get("text_share"), **options)
    held_out = values.get("eval_data")
    validation = None if held_out is None else EvaluationDataset(held_out, **options)
    trust_remote_code = values.get("trust_remote_code", False)
    if not plan_only:
        with looking_for(values["model"]):
            check_unchanged(values["model"], base_model=values.get("base"))
    chat = load_chat(
        values["model"], values.get("base"), None, values.get("dtype", "auto"), "cpu", trust_remote_code
    )  # Trainer moves it to the GPU
    structure = structure_of(chat.model)
    if (quantized := values.get("on_quantized")) is not None:
        with looking_for(quantized):
            if is_bundle(quantized):
                from conversion.qnn.bundle_base import put_on_bundle as put_on
            else:
                from conversion.quantization.healing import put_on_quantized_base as put_on
            structure.trained_on = put_on(chat.model, quantized)
    if plan_only:
        found = stages.plan(structure, chat.processor, chats, settings, validation)
        return {**found.as_dict(), "lines": format_plan(found)}
    try:
        result = stages.train(
            structure, chat.processor, chats, out, settings, validation=validation, resume=resume, run_values=values
        )
    except KeyboardInterrupt:
        note("\nThe run continues from its last checkpoint, if there is one, with the same command and --resume.")
        raise
    loss = "" if result.loss is None else f", last loss {result.loss:.4g}"
    best = "" if result.best is None else f", validation loss {result.best['eval_loss']:.4g}"
    steps, samples = counted(result.steps, "step"), counted(result.num_samples, "sample")
    lines = [f"{out}: stage {settings.stage}, {steps} over {samples}{loss}{best}."]
    if is_main_process():
        note("The base's bytes are unchanged.")
        following = f"genieblue chat {out} --image photo.jpg; genieblue verify {out}"
        if quantized is not None:
            command = "export qnn" if is_bundle(quantized) else "quantize"
            following = f"genieblue {command} {out} --quantized-base {quantized} --out …"
        elif settings.stage == 1:
            following = f"genieblue train --stage 2 --model {out} --data instructions.jsonl --out …"
        note(f"Next: {following}")
    return {**asdict(result), "output": str(out), "lines": lines}
