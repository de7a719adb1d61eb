"""`genieblue chat`: one question, or a conversation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.options import Base, BaseCode, Device, Dtype, Json, NpuBackend, Precision, Revision, View
from genieblue.cli.qnn import open_bundle, refuse_options
from genieblue.cli.terminal import choose_device, looking_for, note, print_json, quiet_transformers, stdout_for_json


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
    npu: Annotated[NpuBackend, typer.Option(help="What runs the bundle's graphs.")] = "cpu",
    adapter: Annotated[
        Path | None, typer.Option(help="File of `export adapter` for a bundle, instead of its own LoRA.")
    ] = None,
    compile_decoding: Annotated[
        bool, typer.Option("--compile", help="Compile decoding: the first answer takes longer, long ones are faster.")
    ] = False,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Ask one question, or hold a conversation with images at any turn."""
    if json_output and prompt is None:
        raise typer.BadParameter("--json answers one request: give it as --prompt.", param_hint="--json")
    if (model is None) == (qnn is None):
        raise typer.BadParameter("Give a model, or a bundle as --qnn.", param_hint="MODEL")
    if qnn is not None:
        drawing, loading = ("temperature", "top_p", "seed"), ("base", "revision", "dtype", "device")
        others = (*drawing, *loading, "compile_decoding", "trust_remote_code")
        refuse_options(ctx, others, "a bundle, which is greedy, and complete as it was compiled")
    else:
        refuse_options(ctx, ("npu", "adapter"), "a model; it is for a bundle (--qnn)")
    with stdout_for_json(json_output):
        quiet_transformers()
        from transformers import set_seed

        from genieblue.cli.chat_loop import converse, describe, show
        from modeling_genieblue.image_reading_genieblue import read_image

        images = [read_image(source, index) for index, source in enumerate(image or [])]
        settings = {"max_new_tokens": max_new_tokens, "view": view}
        if qnn is not None:
            conversation = open_bundle(qnn, npu, adapter)
        else:
            device = choose_device(device)
            conversation = load_chat(model, base, revision, dtype, device, trust_remote_code, compile_decoding)
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


def load_chat(
    model: str,
    base: str | None,
    revision: str | None,
    dtype: Precision,
    device: str,
    trust_remote_code: bool,
    compile_decoding: bool = False,
) -> Any:
    from genieblue.serving.conversation import Chat

    with looking_for(model):
        return Chat.from_pretrained(
            model,
            base_model=base,
            revision=revision,
            dtype=dtype,
            device=device,
            compile=compile_decoding,
            trust_remote_code=trust_remote_code,
        )


__all__ = ["chat", "load_chat"]
