"""What the QNN commands say on a computer that lacks a library, or on which the compiler does not run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from conversion.qnn.export_settings import check_config
from conversion.qnn.npu import sessions as npu
from conversion.qnn.qdq.language import LanguageSettings
from genieblue.cli.app import app

EXPORT = ["export", "qnn", "model", "--out", "bundle", "--soc", "sm8750", "--calibration", "chats.jsonl"]
VERIFY = ["verify", "bundle"]
CHAT = ["chat", "--qnn", "bundle", "--prompt", "hi"]
NEEDED = [
    *((EXPORT, name) for name in npu.LIBRARIES),
    (VERIFY, "onnx"),
    (VERIFY, "onnxruntime"),
    (CHAT, "onnxruntime"),
]


@pytest.mark.parametrize(("command", "library"), NEEDED, ids=[f"{words[0]}-{name}" for words, name in NEEDED])
def test_a_missing_library_names_the_extra_of_the_export(tmp_path, monkeypatch, command, library):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/metadata.json").write_text("{}")
    monkeypatch.setattr(npu, "check_platform", lambda: None)
    util = SimpleNamespace(find_spec=lambda name: None if name == library else name)
    monkeypatch.setattr(npu, "importlib", SimpleNamespace(util=util))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and result.stdout == ""
    told = f"needs the library {library}, which is not installed: pip install 'genieblue[qnn]'"
    assert told in " ".join(result.stderr.split())


def test_without_any_of_its_libraries_the_export_tells_first_where_the_compiler_runs(tmp_path):
    script = (
        "import platform, sys\n"
        "sys.modules.update(dict.fromkeys(('onnxruntime', 'onnxruntime_qnn', 'onnx', 'onnxscript')))\n"
        "platform.machine = lambda: 'aarch64'\n"
        "from genieblue.cli.app import app\n"
        "app()\n"
    )
    command = [sys.executable, "-c", script, *EXPORT[:4], str(tmp_path / "out"), *EXPORT[5:]]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "on aarch64, but the compiler runs on Linux on x86-64 only" in done.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"head_dim": 24}, "num_attention_heads × head_dim of 96"),
        ({"hidden_size": 96}, "hidden_size of 96"),
    ],
    ids=["fits", "heads", "states"],
)
def test_every_width_must_be_a_multiple_of_the_group_size(changes, told):
    text = LlamaConfig(**{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, **changes})
    config = SimpleNamespace(text_config=text)
    settings = LanguageSettings(16, 64, 16, "constants", "w4a16", 64, "gptq", 16, False, None, None)
    if told is None:
        check_config(config, settings, 1, "model")
    else:
        with pytest.raises(ValueError, match=f"{told} is no multiple of the group size 64"):
            check_config(config, settings, 1, "model")
