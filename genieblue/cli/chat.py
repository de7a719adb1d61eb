"""`genieblue chat`: one question, or a conversation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.options import (
    Base,
    BaseCode,
    Device,
    Dtype,
    Json,
    NpuBackend,
    Precision,
    Revision,
    View,
    check_unused_options,
)
from genieblue.cli.qnn import open_bundle
from genieblue.cli.terminal import choose_device, looking_for, note, print_json, quiet_transformers, stdout_for_json
from genieblue.cli.verdict import warn_of_failure

TERMINAL_ONLY = ("image", "prompt", "json_output", "view", "temperature", "top_p", "seed")
PAGE_ONLY = ("host", "port", "served_model")


def chat(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id of a GenieBlue.")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="Image file or URL; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and exit.")] = None,
    json_output: Json = False,
    view: Annotated[View | None, typer.Option(help="Default: multimodal if there are images.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 means greedy decoding.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling threshold.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    qnn: Annotated[str | None, typer.Option(help="Bundle from `export qnn`, instead of a model.")] = None,
    npu: Annotated[NpuBackend, typer.Option(help="Where to run the bundle's graphs.")] = "cpu",
    adapter: Annotated[
        Path | None, typer.Option(help="File from `export adapter`, to replace the bundle's own LoRA.")
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Open a page in the browser; MODEL may then be a server's address.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address of the page; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which model of a server that offers several.")
    ] = None,
    compile_decoding: Annotated[
        bool, typer.Option("--compile", help="Compile decoding: slower first answer, faster long answers.")
    ] = False,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Ask one question, or chat, with images in any turn.

    Without --prompt, each line from the terminal or from stdin is a turn.
    """
    _check_options(ctx, model, qnn, prompt, json_output, web)
    with stdout_for_json(json_output):
        quiet_transformers()
        from transformers import set_seed

        from genieblue.cli.chat_loop import converse, describe, show
        from modeling_genieblue.image_reading_genieblue import read_image

        if web:  # what is missing is said before a model takes its time to load
            from genieblue.serving.listening import address_of, check_free

            check_free(host, port)
            from genieblue.serving.web.page import build_page, open_page
        images = [read_image(source, index) for index, source in enumerate(image or [])]
        settings = {"max_new_tokens": max_new_tokens, "view": view}
        if qnn is not None:
            conversation = open_bundle(qnn, npu, adapter)
        elif web and is_address(model):
            from genieblue.serving.server_conversation import ServerConversation

            conversation = ServerConversation(str(model), served_model)
        else:
            device = choose_device(device)
            conversation = load_chat(model, base, revision, dtype, device, trust_remote_code, compile_decoding)
            settings |= {"temperature": temperature, "top_p": top_p}
        if web:
            page = build_page(str(qnn or model), conversation, max_new_tokens)
            open_page(page, host, port)
            note(f"The page is at {address_of(host, port)}; Ctrl-C ends it.")
            page.block_thread()
            return
        if seed is not None:
            set_seed(seed)
        if conversation.completes_only:
            note("The base has no chat template: each prompt is completed on its own, without history.")
        if prompt is None:
            converse(conversation, images, **settings)
            return
        result = conversation.ask(prompt, images, on_text=None if json_output else show, **settings)
    if json_output:
        print_json(result)
    else:
        typer.echo()
        note(describe(result))


def is_address(model: str | None) -> bool:
    """Whether a model is named by the address of a server."""
    return model is not None and model.lower().startswith(("http://", "https://"))


def _check_options(
    ctx: typer.Context, model: str | None, qnn: str | None, prompt: str | None, json_output: bool, web: bool
) -> None:
    """`BadParameter` for options that do not go together."""
    if web:
        check_unused_options(ctx, TERMINAL_ONLY, "the page, where everything is asked in the browser")
    else:
        check_unused_options(ctx, PAGE_ONLY, "a conversation in the terminal, only to the page (--web)")
    if json_output and prompt is None:
        raise typer.BadParameter("--json answers a single request: give it with --prompt.", param_hint="--json")
    if (model is None) == (qnn is None):
        raise typer.BadParameter("Give either a model or a bundle (--qnn).", param_hint="MODEL")
    sampling, running = ("temperature", "top_p", "seed"), ("compile_decoding", "dtype", "device")
    loading = (*running, "base", "revision", "trust_remote_code")
    if qnn is not None:
        others = (*sampling, *loading)
        check_unused_options(ctx, others, "a bundle, which decodes greedily and is fixed when it is compiled")
    else:
        check_unused_options(ctx, ("npu", "adapter"), "a model, only to a bundle (--qnn)")
    if web and is_address(model):
        check_unused_options(ctx, loading, "a server, which has loaded its model")
    else:
        check_unused_options(ctx, ("served_model",), "a model that is loaded here, only to a server's address")


def load_chat(
    model: str,
    base: str | None,
    revision: str | None,
    dtype: Precision,
    device: str,
    trust_remote_code: bool,
    compile_decoding: bool = False,
) -> Any:
    """A conversation with a model; `OSError` that names it if it is not there."""
    from genieblue.serving.conversation import Chat

    with looking_for(model):
        chat = Chat.from_pretrained(
            model,
            base_model=base,
            revision=revision,
            dtype=dtype,
            device=device,
            compile=compile_decoding,
            trust_remote_code=trust_remote_code,
        )
    warn_of_failure(model, getattr(chat.model.config, "quantization", None))
    return chat
