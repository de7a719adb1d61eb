"""A vLLM server for a GenieBlue: its command line with limits that a public address needs, started and waited for."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genieblue.serving.listening import address_of, check_free
from genieblue.serving.vllm.plugin import MEDIA_CONNECTOR, other_version

WAIT_SECONDS = 0.5
OWN_OPTIONS = {
    "--model", "--served-model-name", "--host", "--port", "--dtype", "--tensor-parallel-size", "-tp",
    "--limit-mm-per-prompt", "--max-model-len", "--revision", "--hf-overrides", "--allowed-media-domains",
}  # fmt: skip


@dataclass
class ServerSettings:
    """What a server is started with.

    Attributes:
        max_images: of one request; max_image_pixels: width times height of each.
        max_length: tokens of prompt and answer together; `None` for the base's own limit.
        allow_domains: hosts from which images are fetched; with none, images come in the request alone.
        other: further options of `vllm serve`.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_images: int = 8
    max_image_pixels: int = 40_000_000
    max_length: int | None = None
    dtype: str = "auto"
    tensor_parallel: int = 1
    revision: str | None = None
    base: str | None = None
    allow_domains: Sequence[str] = ()
    other: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        # A part of a setting (`--limit-mm-per-prompt.image`) or of a list (`--allowed-media-domains+`) is that option.
        given = [re.split(r"[=.+]", option)[0].replace("_", "-") for option in self.other if option.startswith("-")]
        for name in sorted(given):
            if _is_own(name):
                raise ValueError(f"{name} is what `genieblue serve` sets itself: use its own option instead.")
            if name in ("--uds", "--headless") or name.startswith(("--ssl-", "--grpc")):
                raise ValueError(f"{name}: the server answers plain HTTP at host and port; put a proxy in front.")

    @property
    def name(self) -> str:
        """The model's name for clients: a folder's own, or the Hub id."""
        return Path(self.model).resolve().name if os.path.isdir(self.model) else self.model

    @property
    def address(self) -> str:
        """Where clients find it."""
        return address_of(self.host, self.port)

    @property
    def base_location(self) -> dict[str, str | None]:
        """What stands in the model's configuration instead of the recorded base."""
        if self.base is None:
            return {}
        base = os.path.abspath(self.base) if os.path.isdir(self.base) else self.base
        return {"base_model_name_or_path": base, "base_model_revision": None}

    def command(self) -> list[str]:
        """The server's command line; the module is there in every build of vLLM."""
        options = {
            "--model": self.model, "--served-model-name": self.name, "--host": self.host, "--port": self.port,
            "--dtype": self.dtype, "--tensor-parallel-size": self.tensor_parallel,
            "--limit-mm-per-prompt": json.dumps({"image": self.max_images}),
        }  # fmt: skip
        if self.max_length is not None:
            options["--max-model-len"] = self.max_length
        if self.revision is not None:
            options["--revision"] = self.revision
        if self.base_location:
            options["--hf-overrides"] = json.dumps(self.base_location)
        arguments = [text for name, value in options.items() for text in (name, str(value))]
        if self.allow_domains:
            arguments += ["--allowed-media-domains", *self.allow_domains]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *self.other]

    def environment(self) -> dict[str, str]:
        """The variables of this process with those by which vLLM limits images."""
        return {
            **os.environ,
            "VLLM_MAX_IMAGE_PIXELS": str(self.max_image_pixels),
            "VLLM_MEDIA_CONNECTOR": MEDIA_CONNECTOR,
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host could lead to any other
        }

    def example(self) -> str:
        """A line for a shell that asks the server something."""
        message = {"model": self.name, "messages": [{"role": "user", "content": "Hello"}]}
        return (
            f"curl {self.address}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(message))}"
        )


def _is_own(name: str) -> bool:
    """Whether vLLM would take an option for one of `OWN_OPTIONS`: it knows an option by its beginning, too."""
    if not name.startswith("--"):
        return name.startswith("-tp")
    return len(name) > 2 and any(own.startswith(name) for own in OWN_OPTIONS)


def check_model(settings: ServerSettings) -> None:
    """`ValueError` or `OSError` for a model or base that cannot be served, before vLLM takes its time to start."""
    from genieblue.serving.vllm.base import find_base
    from modeling_genieblue import GenieBlueConfig

    options = {} if settings.revision is None else {"revision": settings.revision}
    config = GenieBlueConfig.from_pretrained(settings.model, **options)
    for name, value in settings.base_location.items():
        setattr(config, name, value)
    find_base(settings.model, settings.revision, config)


def start(settings: ServerSettings) -> subprocess.Popen:
    """The process of a server that answers.

    Raises `OSError` if its address is taken, where something else would answer for it, or if it ends before it
    serves, and `ModuleNotFoundError` without vLLM.
    """
    check_vllm()
    check_free(settings.host, settings.port)
    process = subprocess.Popen(settings.command(), env=settings.environment())
    try:
        while not _answers(settings.address):
            if process.poll() is not None:
                raise OSError(f"vLLM ended with {process.returncode} before it served: the reason is above.")
            time.sleep(WAIT_SECONDS)
    except BaseException:
        stop(process)
        raise
    return process


def stop(process: subprocess.Popen) -> None:
    """Ends a server, which finishes what it is answering, and waits for it."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check_vllm() -> None:
    """`ModuleNotFoundError` without vLLM, `ImportError` with another version of it."""
    try:
        from vllm._version import __version__  # without the seconds that importing all of it takes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Serving needs vLLM, which is not installed: pip install 'genieblue[vllm]' in an environment of its own.",
            name="vllm",
        ) from error
    if (error := other_version(__version__)) is not None:
        raise error


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
