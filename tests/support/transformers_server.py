"""`transformers serve` in a process of its own."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from server_process import server_process

COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]


def serving(folder: Path, env: dict[str, str]) -> AbstractContextManager[str]:
    """Address of a server that has no model yet, and no package of ours either: it runs the repository's code.

    It is started in `folder`, where its log is written, and loads what a request names as a path from there.
    """
    options = ["serve", "--host", "127.0.0.1", "--device", "cpu", "--trust-remote-code", "--port"]
    return server_process(lambda port: [*COMMAND, *options, str(port)], folder / "serve.log", cwd=folder, env=env)
