"""The command `genieblue`. Heavy libraries are imported by the commands that need them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.info import print_info
from genieblue.cli.input_files import data_source, read_template
from genieblue.cli.options import (
    Backend,
    Base,
    BaseCode,
    Device,
    Dtype,
    Json,
    Model,
    NpuBackend,
    Placement,
    PlacementOption,
    Precision,
    Revision,
    Structure,
    View,
)
from genieblue.cli.qnn import export_app, is_bundle, open_bundle, refuse_options, verify_qnn_bundle
from genieblue.cli.quantize import quantize
from genieblue.cli.terminal import (
    ReportingGroup,
    check_name,
    choose_device,
    in_command_words,
    looking_for,
    note,
    print_json,
    print_table,
    quiet_hub,
    quiet_transformers,
    speak_plainly,
    stdout_for_json,
)

app = typer.Typer(
    cls=ReportingGroup,
    help="GenieBlue: eyes for a frozen language model, whose text answers do not change by one bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and all log messages (or set GENIEBLUE_DEBUG=1).")
    ] = False,
) -> None:
    """Settings of all commands."""
    speak_plainly(debug)


@app.command()
def init(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base language model.", show_default=False)],
    vision: Annotated[str, typer.Option(help="Folder or Hub id of a SigLIP.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the new GenieBlue.", show_default=False)],
    placement: PlacementOption = Placement.skip,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="LoRA alpha.")] = 16,
    max_tiles: Annotated[int, typer.Option(help="Most tiles that an image is cut into: 1, 4, 9, 16, …")] = 16,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a base that has no chat template.", show_default=False)
    ] = None,
    dtype: Dtype = Precision.auto,
    base_revision: Revision = None,
    vision_revision: Revision = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a GenieBlue that lies in the folder.")
    ] = False,
    trust_remote_code: BaseCode = False,
) -> None:
    """Make a new GenieBlue from a base and a SigLIP."""
    check_name(base, "The base")
    check_name(vision, "The vision model")
    template = None if chat_template is None else read_template(chat_template)
    quiet_transformers()
    from conversion.create import create_genieblue

    out = out.expanduser()
    folder = create_genieblue(
        base,
        vision,
        out,
        placement=placement.value,
        lora_rank=rank,
        lora_alpha=alpha,
        max_tiles=max_tiles,
        chat_template=template,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
        base_revision=base_revision,
        vision_revision=vision_revision,
        overwrite=overwrite,
    )
    print_info(str(folder), base=None, revision=None)
    note(f"\nNext: genieblue train --stage 1 --model {folder} --data captions.jsonl --out {folder}-stage1")


@app.command()
def train(
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: the projector; 2: all that GenieBlue adds.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of the GenieBlue to begin with.", show_default=False)],
    data: Annotated[
        Path, typer.Option(help="JSONL file of chats, or a folder that `datasets` saved.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the trained GenieBlue.", show_default=False)],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where image paths begin; by default beside the JSONL file.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default=False)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; 1 by default.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches in one optimizer step.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; the paper's by default.", show_default=False)
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens in a sample, image tokens included.")] = 4096,
    max_tiles: Annotated[
        int | None,
        typer.Option(
            help="Most tiles of an image; by default 1 in stage 1, as at `init` in stage 2.", show_default=False
        ),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="bfloat16 autocast; as the base by default.", show_default=False),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory, take a third more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 writes none.")] = 500,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that prepare the data.")] = 0,
    seed: int = 42,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad samples out instead of stopping.")] = False,
    base: Base = None,
    dtype: Dtype = Precision.auto,
    trust_remote_code: BaseCode = False,
) -> None:
    """Train one of the two stages; the base stays as it is."""
    from genieblue.training.chats import ChatDataset
    from genieblue.training.stages import TrainingSettings, refuse_taken_output
    from genieblue.training.stages import train as run

    settings = TrainingSettings(
        stage=stage,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        max_length=max_length,
        max_tiles=max_tiles,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        num_workers=num_workers,
        seed=seed,
    )
    out = out.expanduser()  # shells leave `--out=~/x` as it is
    refuse_taken_output(out.absolute())
    chats = ChatDataset(data_source(data), image_folder=image_folder, skip_bad=skip_bad)
    quiet_transformers()
    chat = _load_chat(model, base, None, dtype, "cpu", trust_remote_code)  # Trainer moves it to the GPU
    result = run(chat.model, chat.processor, chats, out, settings, resume=resume)
    loss = "" if result.loss is None else f", last loss {result.loss:.4g}"
    typer.echo(f"{result.output}: stage {stage}, {result.steps} steps over {result.num_samples} samples{loss}.")
    note("The base's bytes are what they were before.")
    if stage == 1:
        note(f"Next: genieblue train --stage 2 --model {out} --data instructions.jsonl --out …")
    else:
        note(f"Next: genieblue chat {out} --image photo.jpg; genieblue verify {out}")


@app.command()
def chat(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a GenieBlue.", show_default=False)] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Image file or address; may be repeated.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, end.", show_default=False)
    ] = None,
    json_output: Json = False,
    view: Annotated[View | None, typer.Option(help="Chosen by the images, if left out.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likelier tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.", show_default=False)] = None,
    qnn: Annotated[
        str | None, typer.Option(help="Bundle of `export qnn` to ask, instead of a model.", show_default=False)
    ] = None,
    npu: Annotated[NpuBackend, typer.Option(help="What runs the bundle's graphs.")] = NpuBackend.cpu,
    adapter: Annotated[
        Path | None, typer.Option(help="File of `export adapter` for a bundle, instead of its own LoRA.")
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="What multiplies 4-bit weights; onnxruntime: 8-bit activations, fast on one core.")
    ] = Backend.quanto,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = Precision.auto,
    device: Device = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Ask one question, or hold a conversation with images at any turn."""
    if json_output and prompt is None:
        raise typer.BadParameter("--json answers one request: give it as --prompt.", param_hint="--json")
    if (model is None) == (qnn is None):
        raise typer.BadParameter("Give a model, or a bundle as --qnn.", param_hint="MODEL")
    if qnn is not None:
        drawing, loading = ("temperature", "top_p", "seed"), ("backend", "base", "revision", "dtype", "device")
        others = (*drawing, *loading, "trust_remote_code")
        refuse_options(ctx, others, "a bundle, which is greedy, and complete as it was compiled")
    else:
        refuse_options(ctx, ("npu", "adapter"), "a model; it is for a bundle (--qnn)")
    with stdout_for_json(json_output):
        quiet_transformers()
        from transformers import set_seed

        from genieblue.cli.chat_loop import converse, describe, show
        from modeling_genieblue.image_processing_genieblue import read_image

        images = [read_image(source, index) for index, source in enumerate(image or [])]
        settings = {"max_new_tokens": max_new_tokens, "view": None if view is None else view.value}
        if qnn is not None:
            conversation = open_bundle(qnn, npu.value, adapter)
        else:
            where = "cpu" if backend == Backend.onnxruntime and device is None else choose_device(device)
            conversation = _load_chat(model, base, revision, dtype, where, trust_remote_code, backend.value)
            settings |= {"temperature": temperature, "top_p": top_p}
        if seed is not None:
            set_seed(seed)
        if conversation.completes_only:
            note("The base has no chat template: what you write is completed, and not remembered.")
        if prompt is None:
            converse(conversation, images, **settings)
            return
        result = conversation.ask(prompt, images, on_text=None if json_output else show, **settings)
    if json_output:
        print_json(result)
    else:
        typer.echo()
        note(describe(result))


def _load_chat(
    model: str,
    base: str | None,
    revision: str | None,
    dtype: Precision,
    device: str,
    trust_remote_code: bool,
    backend: str = Backend.quanto.value,
) -> Any:
    from genieblue.serving.conversation import Chat

    with looking_for(model):
        return Chat.from_pretrained(
            model,
            base_model=base,
            revision=revision,
            dtype=dtype.value,
            device=device,
            backend=backend,
            trust_remote_code=trust_remote_code,
        )


@app.command()
def info(model: Model, json_output: Json = False, base: Base = None, revision: Revision = None) -> None:
    """List the parts of a GenieBlue, their parameters and bytes."""
    if not json_output:
        print_info(model, base, revision)
        return
    from hub_cards.model_parts import model_info

    with stdout_for_json(True), looking_for(model):
        found = model_info(model, base=base, revision=revision)
    print_json(found.as_json())


@app.command()
def params(
    preset: Annotated[str, typer.Argument(help="bluelm-3b or qwen2.5-3b.", show_default=False)],
    structure: Annotated[Structure, typer.Option(help="Structure of the paper.")] = Structure.genieblue,
    placement: PlacementOption = Placement.skip,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    json_output: Json = False,
) -> None:
    """Count what a structure of the paper trains."""
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.lab.parameters import count_trainable

        counted = count_trainable(preset, structure.value, placement.value, rank)
    if json_output:
        print_json(counted)
        return
    parts = {**counted["parts"], "trainable": counted["trainable_parameters"]}
    rows = [(name, f"{number:,}", f"{number / 1e6:.2f} M") for name, number in parts.items()]
    print_table((f"{preset}, {structure.value}", "parameters", ""), rows)


@app.command()
def verify(
    ctx: typer.Context,
    model: Model,
    json_output: Json = False,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = Precision.auto,
    device: Device = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Prove that a GenieBlue, or a bundle of `export qnn`, is what it says.

    The exit code is 1 if any check fails. The last check runs the Python files of the model's own repository, in a
    process of its own. Of a bundle, --base says what the weights of its text graphs are compared with.
    """
    bundled = is_bundle(model)
    if bundled:
        code = ("trust_remote_code",) if base is None else ()  # it would be the base's
        refuse_options(ctx, ("revision", "dtype", "device", *code), "a bundle, which is complete as it was compiled")

    def show_check(check: Any) -> None:
        typer.secho("ok    " if check.ok else "FAIL  ", nl=False, fg="green" if check.ok else "red", bold=True)
        typer.echo(f"{check.name:<17} {in_command_words(check.detail)}")

    with stdout_for_json(json_output), looking_for(model):
        quiet_transformers()
        if bundled:
            checks = verify_qnn_bundle(model, base, show_check, trust_remote_code)
        else:
            from conversion.verification.verify import verify_model

            checks = verify_model(
                model,
                base=base,
                revision=revision,
                dtype=dtype.value,
                device=choose_device(device),
                trust_remote_code=trust_remote_code,
                on_check=show_check,
            )
    passed = sum(check.ok for check in checks)
    if json_output:
        listed = [{"name": check.name, "ok": check.ok, "detail": in_command_words(check.detail)} for check in checks]
        print_json({"ok": passed == len(checks), "checks": listed})
    else:
        typer.echo(f"{passed} of {len(checks)} checks passed.")
    if passed < len(checks):
        raise typer.Exit(1)


app.command()(quantize)
app.add_typer(export_app, name="export")


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a GenieBlue, or of a quantized base.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub: you/model.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="Where a local base is on the Hub: you/base or you/base@commit.", show_default=False),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Annotated[
        str | None, typer.Option(help="By default HF_TOKEN, or what `hf auth login` stored.", show_default=False)
    ] = None,
) -> None:
    """Check a GenieBlue, or a quantized base, and publish it on the Hub.

    It becomes one commit. The base of a GenieBlue must be on the Hub already, or lie within its folder; --base names
    the repository if the folder has a local one, whose files must be the same.
    """
    from hub_cards.model_folder import read_base_quantization
    from hub_cards.publish import publish_folder
    from hub_cards.publish_base import publish_quantized_base

    quiet_hub()
    options = {
        "private": private, "token": token, "revision": revision, "commit_message": message, "create_pr": create_pr
    }  # fmt: skip
    if read_base_quantization(folder) is None:
        commit = publish_folder(folder, repo_id, base=base, **options)
    elif base is None:
        commit = publish_quantized_base(folder, repo_id, **options)
    else:
        raise typer.BadParameter(f"{folder} is itself a base: leave --base out.", param_hint="--base")
    typer.echo(commit.pr_url or commit.commit_url)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path("demo-out"),
    seed: int = 0,
    json_output: Json = False,
) -> None:
    """Make a small GenieBlue that reads handwriting.

    It takes under 10 minutes on two cores, without a network. The exit code is 1 if the base's text answers changed.
    """
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.demo.run import format_report, run_demo, text_is_unchanged

        report = run_demo(out, seed=seed)
    if json_output:
        print_json(report)
    else:
        typer.echo(format_report(report, out))
    if not text_is_unchanged(report):
        raise typer.Exit(1)
