"""`transformers serve` in a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]


@contextmanager
def serving(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Address of a server that has no model yet, and no package of ours either: it runs the repository's code.

    It is started in `folder`, where its log is written, and loads what a request names as a path from there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    with open(folder / "serve.log", "w") as log:
        server = subprocess.Popen([*COMMAND, "serve", *options], cwd=folder, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "serve.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)
