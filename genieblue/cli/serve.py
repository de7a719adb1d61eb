"""`genieblue serve`: a vLLM server that answers OpenAI's clients, each request in its view."""

import signal
import sys
from typing import Annotated

import typer

from genieblue.cli.options import Base, Dtype, Model, Revision
from genieblue.cli.terminal import looking_for, note


def serve(
    model: Model,
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of `vllm serve`, behind `--`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images in a request.")] = 8,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Maximum width times height of an image.")] = 40_000_000,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of prompt and answer; default: the base's.")
    ] = None,
    allow_domain: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images from this host; may be repeated. Default: fetch none."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Number of GPUs to split the model over.")] = 1,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model with vLLM to any client of OpenAI's API.

    Requests of text get the base's own answers, requests with images the multimodal view's.
    """
    from genieblue.serving.vllm.server import ServerSettings, check_model, check_vllm, start, stop

    check_vllm()
    settings = ServerSettings(
        model, host, port, max_images, max_image_pixels, max_length, dtype, tensor_parallel, revision, base,
        allow_domain or (), vllm_options or (),
    )  # fmt: skip
    with looking_for(model):
        check_model(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends vLLM too
    process = start(settings)
    try:
        note(f"Serving {settings.name} at {settings.address}/v1")
        note(settings.example())
        raise typer.Exit(process.wait())
    except KeyboardInterrupt:
        pass
    finally:
        stop(process)
