"""What the QNN commands say on a computer that lacks a library, or on which the compiler does not run."""

import json
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


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder that is taken for a bundle, and nothing needed to open one."""
    monkeypatch.setattr(npu, "check_libraries_installed", lambda *_: None)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/metadata.json").write_text("{}")
    return tmp_path / "bundle"


def run(*command) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, command)))
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_verify_hands_held_out_chats_to_the_verdict_on_a_bundle(bundle, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the extra `qnn`")
    from conversion.qnn import verdict, verify
    from conversion.qnn.bundle.metadata import FORMAT_VERSION, signed
    from genieblue.evaluation.qnn_held_out import BundleHeldOut

    chats, given = tmp_path / "chats.jsonl", {}
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    chats.write_text(json.dumps(chat) + "\n")

    def verify_bundle(_path, *, verdict_on, **_options):
        given.update(verdict_on(bundle, "reader", revision="abc"))
        return []

    facts = {"format_version": FORMAT_VERSION, "context_length": 64, "generation": {"eos_token_ids": [2]}}
    (bundle / "metadata.json").write_text(json.dumps(signed(facts)))
    monkeypatch.setattr(BundleHeldOut, "check", lambda _self, *asked: given.update(checked=asked))
    monkeypatch.setattr(verify, "verify_bundle", verify_bundle)
    monkeypatch.setattr(verdict, "judge", lambda *given, **options: {"judged": given, **options})
    monkeypatch.setattr(
        "modeling_genieblue.GenieBlueForConditionalGeneration.from_pretrained", lambda *name, **where: (name, where)
    )
    monkeypatch.setattr("modeling_genieblue.GenieBlueProcessor.from_pretrained", lambda folder: folder)
    code, output = run("verify", bundle, "--eval-data", chats, "--metric", "anls", "--trust-remote-code")
    assert code == 0, output
    assert given["checked"] == (bundle / "processor", 64, [2])
    model, folder, requests, answers = given["judged"]
    assert model == (("reader",), {"base_model": None, "trust_remote_code": True, "revision": "abc"})
    assert folder == bundle and answers.__self__.chats[0][0].metric == "anls" and not given["accept_loss"]
    assert iter(requests) is requests  # read when they are needed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--metric", "anls"], "--metric: It does not apply to a bundle"),
        (["--eval-data", "a.jsonl", "--max-answer-loss", "5"], "--max-answer-loss: It does not apply to a bundle"),
        (["--trust-remote-code"], "--trust-remote-code: It does not apply to a bundle"),
    ],
)
def test_verify_refuses_what_a_bundle_has_no_use_for(bundle, options, told):
    code, output = run("verify", bundle, *options)
    assert code == 2 and told in output


@pytest.mark.parametrize("accepted", [False, True])
def test_a_failed_bundle_that_answers_is_warned_of(bundle, monkeypatch, caplog, accepted):
    pytest.importorskip("onnxruntime", reason="needs the extra `qnn`")
    from conversion.qnn.bundle import runner
    from genieblue.cli.qnn import open_bundle

    found = {"verdict": {"result": "failed", "accepted": accepted, "reasons": ["it lost 9 points"]}}
    opened = SimpleNamespace(bundle=SimpleNamespace(metadata=found), processor=None)
    monkeypatch.setattr(runner, "QnnRunner", lambda *_names, **_options: opened)
    monkeypatch.setattr("genieblue.serving.qnn_conversation.QnnChat", lambda runner: runner)
    assert open_bundle(str(bundle), "cpu", None) is opened
    assert (f"{bundle} lost too much by its verdict: it lost 9 points. " in caplog.text) != accepted


def test_an_adapter_is_for_one_bundle(bundle, tmp_path):
    code, output = run("eval", bundle, "--data", "a.jsonl", "--compare", bundle, "--adapter", "other.npz")
    assert code == 2 and "An adapter is for one bundle" in output
    code, output = run("eval", tmp_path, "--data", "a.jsonl", "--adapter", "other.npz")
    assert code == 2 and "--adapter: It does not apply to a model, only to a bundle" in output
