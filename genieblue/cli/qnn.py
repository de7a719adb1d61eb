"""`genieblue export qnn`, and how `chat` and `verify` use a bundle for a phone's NPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from conversion.qnn.npu.soc import SOCS, find_soc
from genieblue.cli.options import (
    Base,
    BaseCode,
    CalibrationImages,
    Json,
    LoraMode,
    QnnPrecision,
    QnnRounding,
    Revision,
    UnquantizedModel,
    check_not_empty,
    loading_options,
    read_bytes,
)
from genieblue.cli.terminal import (
    ended_by_sigterm,
    looking_for,
    note,
    print_json,
    quiet_transformers,
    stdout_for_json,
)
from genieblue.cli.verdict import warn_of_failure
from hub_cards.short_numbers import short_bytes

HELD_OUT = 8  # calibration chats that only the verdict reads

export_app = typer.Typer(
    help="Export a GenieBlue for a device or another engine.", no_args_is_help=True, rich_markup_mode=None
)


@export_app.callback()
def export() -> None:
    """Export a GenieBlue for a device or another engine."""


@export_app.command()
def qnn(
    model: UnquantizedModel,
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    soc: Annotated[str, typer.Option(help=f"Chip: {', '.join(SOCS)}.")],
    calibration: Annotated[Path, typer.Option(help="JSONL of chats, some with images, as for training.")],
    image_folder: CalibrationImages = None,
    samples: Annotated[int, typer.Option(min=2, help="Number of calibration chats.")] = 32,
    eval_data: Annotated[
        Path | None, typer.Option(help="Chats as for `eval`: the verdict counts the answers that the bundle loses.")
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Exit with 0 even if the verdict is that too much is lost.")
    ] = False,
    llm: Annotated[QnnPrecision, typer.Option(help="mixed: 8 bits for the matrices that 4 damage most.")] = "w4a16",
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a 4-bit scale: 32, 64, 128, or 0 for a channel's all.")
    ] = 32,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="Average of the base's matrices in mixed; default: 5.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(parser=read_bytes, metavar="SIZE", help="The same by the size of all weights, such as 2.3GB."),
    ] = None,
    quantized_base: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            help="Keep the codes of this bundle's base, on which MODEL was trained.",
            callback=check_not_empty,
        ),
    ] = None,
    embedding_bits: Annotated[int, typer.Option(help="16, or 8 for half the table.")] = 16,
    chunk_length: Annotated[int, typer.Option(min=1, help="Prefill chunk size, in tokens.")] = 128,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation, in tokens; default: at most 2048.")
    ] = None,
    parts: Annotated[int, typer.Option(min=1, help="Number of binaries for the blocks; more use less memory.")] = 1,
    lora: Annotated[LoraMode, typer.Option(help="inputs: one binary serves several adapters.")] = "constants",
    cache_bits: Annotated[int, typer.Option(help="16, or 8 for half the cache.")] = 16,
    vision_tiles: Annotated[int, typer.Option(min=1, help="Image tiles per call of the vision graph.")] = 1,
    rounding: Annotated[
        QnnRounding | None,
        typer.Option(help="gptq (default): 4-bit codes make up for each other's errors; rtn: to nearest."),
    ] = None,
    encodings: Annotated[
        bool, typer.Option("--encodings", help="Also write float graphs with AIMET .encodings, for qairt-converter.")
    ] = False,
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Compile a bundle of context binaries for a Snapdragon NPU.

    The bundle has a vision graph and, in one binary with shared weights, prefill and decode graphs for the text and
    multimodal views. An interrupted export resumes when it is run again with the same settings. It ends with a
    verdict: the bundle against the model on chats of the calibration file that were held back, and the answers to
    --eval-data. If too much is lost, the bundle is kept and marked, and the exit code is 1.
    """
    from conversion.qnn.npu.sessions import check_libraries_installed, check_platform

    find_soc(soc)
    check_platform()
    check_libraries_installed()
    options = loading_options(revision, trust_remote_code)
    with stdout_for_json(json_output), ended_by_sigterm():
        quiet_transformers()
        from conversion.qnn.export import export_bundle
        from conversion.qnn.export_settings import check_vision_side
        from genieblue.data.calibration_chats import read_chats
        from genieblue.data.collation import ChatCollator
        from modeling_genieblue import GenieBlueConfig, GenieBlueProcessor
        from modeling_genieblue.loading_genieblue import LoadRequest

        with looking_for(model):
            LoadRequest.from_arguments(model, dict(options)).check_layout()
            # Has the clearest error for another kind of model.
            check_vision_side(GenieBlueConfig.from_pretrained(model, revision=revision), model)
            encode = ChatCollator(GenieBlueProcessor.from_pretrained(model, **options)).encode
        chats, held_out = divide_chats(read_chats(calibration, samples + HELD_OUT, image_folder=image_folder), samples)
        data, remarks = None, []
        if eval_data is not None:
            from genieblue.evaluation.qnn_held_out import BundleHeldOut

            data = BundleHeldOut([eval_data])
            remarks = data.compare_with_calibration(calibration, image_folder)
        bundle = export_bundle(
            model,
            out,
            soc=soc,
            calibration=map(encode, chats),  # lazy: images are read after all other checks
            chunk_length=chunk_length,
            context_length=context_length,
            parts=parts,
            lora=lora,
            cache_bits=cache_bits,
            vision_tiles=vision_tiles,
            llm=llm,
            group_size=group_size,
            bits_per_weight=bits_per_weight,
            max_bytes=max_bytes,
            quantized_base=quantized_base,
            rounding=rounding,
            embedding_bits=embedding_bits,
            encodings=encodings,
            held_out=map(encode, held_out),
            eval_data=data,
            accept_loss=accept_loss,
            remarks=remarks,
            on_step=lambda title, done, steps: note(f"[{done + 1}/{steps}] {title}"),
            base_model=base,
            **options,
        )
        from conversion.qnn.bundle.metadata import Bundle

        metadata = Bundle(bundle).metadata
    verdict = metadata["verdict"]
    _print_bundle(bundle, soc, verdict, json_output)
    if not verdict["accepted"]:
        from conversion.qnn.bundle.verdict_text import what_loses_less

        note(
            f"{out} is marked as failed, and `push` refuses it. Less is lost with {what_loses_less(metadata)}; `push "
            "--accept-loss` publishes it nevertheless."
        )
        raise typer.Exit(1)


def divide_chats(chats: list[Any], samples: int) -> tuple[list[Any], list[Any]]:
    """Chats to calibrate on, up to `samples`, and up to `HELD_OUT` to hold back, half of them with images.

    If there are not enough for both, a quarter is held back. Of chats that ask the same only the first counts, so that
    no question is on both sides.
    """
    from genieblue.data.same_prompts import prompt_of

    chats = list({prompt_of(chat): chat for chat in reversed(chats)}.values())[::-1]
    count = min(HELD_OUT, max(len(chats) // 4, len(chats) - samples))
    images = [place for place, chat in enumerate(chats) if chat.images]
    texts = [place for place, chat in enumerate(chats) if not chat.images]
    # Never the only one of its kind: without an image, nothing can be calibrated.
    held = {*images[1:][-((count + 1) // 2) :], *texts[1:][-(count // 2) :]} if count > 1 else set()
    return (
        [chat for place, chat in enumerate(chats) if place not in held],
        [chat for place, chat in enumerate(chats) if place in held],
    )


def _print_bundle(bundle: Path, soc: str, verdict: dict[str, Any], as_json: bool) -> None:
    from conversion.qnn.bundle.verdict_text import describe

    files = {path.relative_to(bundle).as_posix(): path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
    if as_json:
        print_json({"bundle": str(bundle), "files": files, "verdict": verdict})
        return
    for name, size in sorted(files.items(), key=lambda item: -item[1])[:12]:
        typer.echo(f"{short_bytes(size):>12}  {name}")
    for line in describe(verdict):
        typer.echo(line)
    typer.echo(f"{bundle}: {short_bytes(sum(files.values()))} in {len(files)} files, for {soc}.")
    if verdict["accepted"]:
        note(f"Next: genieblue verify {bundle}; genieblue chat --qnn {bundle} --image photo.jpg --prompt …")


@export_app.command()
def adapter(
    model: UnquantizedModel,
    bundle: Annotated[Path, typer.Option(help="Bundle from `export qnn --lora inputs`.")],
    out: Annotated[Path, typer.Option(help="Output file, such as other.npz.")],
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Write another GenieBlue's LoRA for a bundle.

    Everything except LoRA must be identical. There is no verdict on it: `genieblue eval` compares its answers.
    """
    from conversion.qnn.adapters import export_adapter

    quiet_transformers()
    options = loading_options(revision, trust_remote_code)
    with looking_for(model):
        path = export_adapter(model, bundle, out, base_model=base, **options)
    typer.echo(f"{path}: {short_bytes(path.stat().st_size)}")
    note(
        f"Its answers were not measured: genieblue eval {model} --data held-out.jsonl --compare {bundle} --adapter "
        f"{path}. Next: genieblue chat --qnn {bundle} --adapter {path} --image photo.jpg --prompt …"
    )


def is_bundle(path: str) -> bool:
    """Whether `path` is an exported bundle rather than a model."""
    folder = Path(path)
    return (folder / "metadata.json").is_file() and not (folder / "config.json").is_file()


def verify_qnn_bundle(
    path: str,
    base: str | None,
    on_check: Callable[[Any], None],
    trust_remote_code: bool,
    eval_data: list[str] | None = None,
    metric: str | None = None,
) -> list:
    """Checks a bundle, with `base` also against the base itself; repeats the verdict on `eval_data`."""
    from conversion.qnn.npu.sessions import check_libraries_installed

    # The compiler is optional: without it, the checks that need it fail and say why.
    check_libraries_installed(("onnxruntime", "onnx"))
    from conversion.qnn.verify import verify_bundle

    again = None
    if eval_data:
        from genieblue.evaluation.qnn_held_out import BundleHeldOut

        again = _repeated_verdict(BundleHeldOut(eval_data, metric=metric), base, trust_remote_code)
    loaded = None
    if base is not None:
        from transformers import AutoModelForCausalLM

        with looking_for(base):
            loaded = AutoModelForCausalLM.from_pretrained(
                base, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    return verify_bundle(path, base=loaded, verdict_on=again, on_check=on_check)


def _repeated_verdict(data: Any, base: str | None, trust_remote_code: bool) -> Callable[..., dict[str, Any]]:
    """What judges a bundle on held-out `data`, given the model that it was made from."""
    from conversion.qnn.bundle.metadata import Bundle
    from conversion.qnn.verdict import judge
    from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

    def judge_again(folder: Path, model: str, **where: Any) -> dict[str, Any]:
        facts = Bundle(folder).metadata
        processor = GenieBlueProcessor.from_pretrained(folder / "processor")
        data.check(processor, facts["context_length"], facts["generation"]["eos_token_ids"])
        loaded = GenieBlueForConditionalGeneration.from_pretrained(
            model, base_model=base, trust_remote_code=trust_remote_code, **where
        )
        requests = data.requests(processor, HELD_OUT)
        return judge(loaded, folder, requests, data.answers, accept_loss=False)

    return judge_again


def open_bundle(bundle: str, backend: str, adapter: Path | None) -> Any:
    """A conversation with a bundle, with the interface of `genieblue.serving.conversation.Chat`."""
    from conversion.qnn.npu.sessions import check_libraries_installed

    check_libraries_installed(("onnxruntime",))  # opening the emulator checks for its own libraries
    from conversion.qnn.bundle.runner import QnnRunner
    from genieblue.serving.qnn_conversation import QnnChat

    runner = QnnRunner(Path(bundle), backend=backend, adapter=adapter)
    warn_of_failure(bundle, runner.bundle.metadata)
    return QnnChat(runner)
