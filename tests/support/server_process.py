"""A server in a process of its own, on a free port of loopback."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server_process(
    command: Callable[[int], list[str]], log_file: Path, path: str = "/health", seconds: int = 120, **options
) -> Iterator[str]:
    """Address of a server that answers at `path` within `seconds`.

    `command` has its port, `options` are of `Popen`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log_file, "w") as log:
        server = subprocess.Popen(command(port), stdout=log, stderr=log, **options)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(5 * seconds):
            try:
                urllib.request.urlopen(address + path, timeout=5)
                break
            except OSError:
                assert server.poll() is None, log_file.read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
