"""`verify` of a quantized base alone: a good one passes, and each kind of damage fails the check that is about it."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_quantized import changed_tensors, large_pair, quantized_pair
from typer.testing import CliRunner

from conversion.quantization.bases import record_verdict
from conversion.verification.verify_base import is_quantized_base, verify_quantized_base
from genieblue.cli.app import app
from hub_cards.publish_base import publish_quantized_base
from modeling_genieblue.model_files_genieblue import QUANTIZED_WEIGHTS_NAME, file_sha256


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(quantized_pair(llm="w4a16", rounding="rtn") / "base", tmp_path / "base"))


def failed(base) -> dict[str, str]:
    return {check.name: check.detail for check in verify_quantized_base(base) if not check.ok}


def test_a_good_one_passes(base):
    checks = {check.name: check for check in verify_quantized_base(base)}
    assert all(check.ok for check in checks.values()), checks
    assert list(checks) == ["files", "numbers", "verdict", "loads"]
    assert "not measured" in checks["verdict"].detail and "LlamaForCausalLM" in checks["loads"].detail


def test_one_changed_code_is_seen(base):
    weights = base / QUANTIZED_WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert list(failed(base)) == ["files"] and "sha256 of quantized_model.safetensors is" in failed(base)["files"]


def record_sha256(base: Path, **sha256: str) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["weight_fingerprint"] = sha256
    (base / "config.json").write_text(json.dumps(config))


def test_without_a_recorded_sha256_it_does_not_pass(base):
    record_sha256(base)
    assert "no sha256 of its weights is recorded" in failed(base)["files"]


def test_numbers_that_rounding_does_not_give_fail(base):
    with changed_tensors(base / QUANTIZED_WEIGHTS_NAME) as tensors:
        scale = next(name for name in tensors if name.endswith("._scale"))
        tensors[scale] = -tensors[scale]
    record_sha256(base, **{QUANTIZED_WEIGHTS_NAME: file_sha256(base / QUANTIZED_WEIGHTS_NAME)})
    assert list(failed(base)) == ["numbers"] and "scale that is not positive" in failed(base)["numbers"]


def test_a_verdict_that_failed_fails(base):
    verdict = {"result": "failed", "accepted": False, "reasons": ["the text view loses 9 points"]}
    record_verdict(base, verdict)
    assert failed(base) == {"verdict": "as recorded: failed; the text view loses 9 points"}
    record_verdict(base, {**verdict, "accepted": True})
    assert failed(base) == {}


def test_on_the_hub_it_passes_too(hub, base):
    publish_quantized_base(base, "you/base-w4a16")
    assert failed("you/base-w4a16") == {}


def test_the_command_says_which_kind_it_is_and_what_does_not_apply(base):
    result = CliRunner().invoke(app, ["verify", str(base)])
    assert result.exit_code == 0 and "4 of 4 checks passed." in result.stdout, result.output
    result = CliRunner().invoke(app, ["verify", str(base), "--eval-data", "a.jsonl"])
    assert result.exit_code == 2
    assert "does not apply to a quantized base, only to a GenieBlue on it" in " ".join(
        result.output.replace("│", " ").split()
    )


def test_other_folders_are_none(tmp_path):
    assert not is_quantized_base(str(large_pair().parent / "base-llm")) and not is_quantized_base(str(tmp_path))
    with pytest.raises(ValueError, match="is not a base quantized by GenieBlue"):
        verify_quantized_base(large_pair().parent / "base-llm")
