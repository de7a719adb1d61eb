"""llama.cpp as `make test-llamacpp` builds it: its server, and its converter for bases."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from command_line import REPOSITORY
from server_process import server_process

LLAMA_CPP = REPOSITORY / ".venvs/llamacpp"
SERVER = LLAMA_CPP / "build/bin/llama-server"
# The converter knows tokenizers by what they make of one text; it knows none that was made for a test.
CONVERT = """
import runpy, sys
from conversion import base, get_model_class
family, pre = sys.argv.pop(1), sys.argv.pop(1)
get_model_class(family).set_vocab = base.TextModel._set_vocab_gpt2
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


def write_base_gguf(folder: Path, family: str, path: Path, pre: str = "gpt-2") -> None:
    """Writes a base in a folder, of the class `family` and with a byte-level tokenizer, as a GGUF file in float32."""
    command = [sys.executable, "-c", CONVERT, family, pre, str(folder), "--outfile", str(path), "--outtype", "f32"]
    source = LLAMA_CPP / "source"
    # Its package `conversion` and its own `gguf`, not ours.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def serving(base: Path, *options: str) -> AbstractContextManager[str]:
    """Address of a server with one slot, one thread and a cache in float32; its log lies beside the base's file."""
    assert SERVER.exists(), f"{SERVER} is missing: `make test-llamacpp` builds it"
    fixed = ["--host", "127.0.0.1", "-np", "1", "-t", "1", "-c", "1024", "--no-warmup", "-ctk", "f32", "-ctv", "f32"]
    return server_process(
        lambda port: [str(SERVER), "-m", str(base), *options, *fixed, "--port", str(port)], base.with_suffix(".log")
    )
