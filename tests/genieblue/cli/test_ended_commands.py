"""Commands that write a folder, ended by SIGTERM while they do: nothing hidden is left."""

import os
import signal
from pathlib import Path

import pytest
from command_line import run
from tiny_genieblue import save_tiny_pair
from tiny_models import tiny_vision_tower
from tiny_quantized import leftovers
from tiny_vlms import save_tiny_vlm_pair

from conversion.lora_form import export_lora
from modeling_genieblue.staging_genieblue import NewFolder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A GenieBlue beside its base, its LoRA form, a SigLIP, and a VLM beside its base."""
    folder = tmp_path_factory.mktemp("sources")
    export_lora(save_tiny_pair(folder / "pair", "qwen2"), folder / "pair/lora")
    tiny_vision_tower().save_pretrained(folder / "siglip")
    save_tiny_vlm_pair(folder / "vlms")
    return folder


COMMANDS = {
    "extract": ["--mllm", "vlms/vlm", "--base", "vlms/base"],
    "from-peft": ["--adapter", "pair/lora", "--vision", "siglip"],
    "export lora": ["pair/genieblue"],
    "export merged": ["pair/genieblue"],
    "export gguf": ["pair/genieblue", "--language-only"],
    "stack": ["pair/genieblue", "--base", "pair/base"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_ended_leaves_nothing(command, sources, tmp_path, monkeypatch):
    def end(*_args, **_kwargs):
        assert leftovers(tmp_path) != []
        os.kill(os.getpid(), signal.SIGTERM)

    def fail(*_args):
        raise AssertionError("the command did not handle SIGTERM")

    monkeypatch.setattr(NewFolder, "put_in_place", end)
    monkeypatch.chdir(sources)
    before = signal.signal(signal.SIGTERM, fail)
    try:
        run(*command.split(), *COMMANDS[command], "--out", tmp_path / "mine", code=128 + signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is fail
    finally:
        signal.signal(signal.SIGTERM, before)
    assert leftovers(tmp_path) == []
