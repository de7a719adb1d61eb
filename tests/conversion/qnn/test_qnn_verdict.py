"""The verdict on a bundle: what is measured on requests that were held back, the limits, and what is said."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

from tiny_qnn import SETTINGS, requests, save_pair

from conversion.qnn import verdict as verdict_module
from conversion.qnn import verify as verify_module
from conversion.qnn.bundle.metadata import Bundle, signed
from conversion.qnn.bundle.verdict_text import describe
from conversion.qnn.export import export_bundle
from conversion.qnn.verdict import judge
from conversion.qnn.verify import verify_bundle
from genieblue.cli.qnn import HELD_OUT, divide_chats
from modeling_genieblue import GenieBlueForConditionalGeneration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return GenieBlueForConditionalGeneration.from_pretrained(save_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """One bundle with 8 bits, to be read only."""
    folder = tmp_path_factory.mktemp("out") / "bundle"
    return export_bundle(model.name_or_path, folder, calibration=requests(), held_out=requests(7)[6:], **SETTINGS)


def test_8_bits_pass_on_requests_that_were_held_back(bundle):
    verdict = Bundle(bundle).metadata["verdict"]
    assert (verdict["result"], verdict["accepted"]) == ("not measured", True)
    assert verdict["reasons"] == ["answers were not compared: give held-out chats (--eval-data)"]
    assert {view: found["requests"] for view, found in verdict["logits"].items()} == {"text": 4, "multimodal": 4}
    readme = (bundle / "README.md").read_text()
    assert all(line in readme for line in describe(verdict)) and "answers were not compared" in readme


def test_labels_choose_the_logits_that_count(model, bundle):
    request = {**requests(1)[0]}
    request["labels"] = [-100] * (len(request["input_ids"]) - 3) + [5, 6, 7]
    found = judge(model, bundle, [request], None, False)
    assert found["logits"]["text"]["tokens"] == 3 and 0.9 < found["logits"]["text"]["perplexity_ratio"] < 1.1
    assert found["result"] == "not measured"
    assert any("for the multimodal view" in reason for reason in found["reasons"])


@pytest.mark.slow
def test_4_bits_of_a_random_model_fail_and_the_bundle_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict_module, "SMALLEST_COSINE", 0.9999)
    settings = {**SETTINGS, "llm": "mixed", "bits_per_weight": 5.0, "embedding_bits": 8}
    folder = export_bundle(
        model.name_or_path, tmp_path / "bundle", calibration=requests(), held_out=requests(4)[6:], **settings
    )
    facts = Bundle(folder).metadata
    assert facts["verdict"]["result"] == "failed" and 4.25 < facts["bits_per_weight"] <= 5.0
    assert facts["embeddings"]["dtype"] == "uint8" and facts["eight_bits"]
    assert "do not ship it" in (folder / "README.md").read_text()
    failed = {check.name: check.detail for check in verify_bundle(folder) if not check.ok}
    assert "below 0.9999" in failed["verdict of the export"]


def test_chats_are_held_back_of_both_kinds_and_never_the_only_one():
    def chats(texts, images):
        messages = [[{"role": "user", "content": f"{place}?"}, {"role": "assistant", "content": "x"}]
                    for place in range(texts + images)]  # fmt: skip
        return [SimpleNamespace(images=[1] * (place >= texts), messages=each) for place, each in enumerate(messages)]

    kept, held = divide_chats(chats(36, 36), 64)
    assert len(kept) == 72 - HELD_OUT and [bool(chat.images) for chat in held] == [False] * 4 + [True] * 4
    kept, held = divide_chats(chats(15, 1), 64)
    assert not [chat for chat in held if chat.images] and len(kept) + len(held) == 16
    assert divide_chats(chats(1, 2), 64)[1] == []
    kept, held = divide_chats(chats(8, 8), 8)  # as many to calibrate on as were asked for
    assert len(kept) == 8 and len(held) == HELD_OUT


# The verdict repeated


def without_graphs(monkeypatch):
    for name in ("_check_vision", "_check_weights", "_check_language"):
        monkeypatch.setattr(verify_module, name, lambda *_: iter(()))


def repeated(bundle, verdict_on) -> tuple[bool, str]:
    check = next(each for each in verify_bundle(bundle, verdict_on=verdict_on) if each.name == "verdict on other data")
    return check.ok, check.detail


def test_the_verdict_is_repeated_against_the_model_that_the_bundle_was_made_from(model, bundle, monkeypatch):
    without_graphs(monkeypatch)

    def judge_again(folder, name, **where):
        loaded = GenieBlueForConditionalGeneration.from_pretrained(name, **where)
        return judge(loaded, folder, requests(6)[4:], None, False)

    ok, detail = repeated(bundle, judge_again)
    assert ok and detail.startswith(f"against {model.name_or_path}; text view, logits of")
    assert "verdict: not measured" in detail
    monkeypatch.setattr(verdict_module, "SMALLEST_COSINE", 1.1)
    ok, detail = repeated(bundle, judge_again)
    assert not ok and "verdict: failed" in detail


def test_without_that_model_or_with_other_weights_it_is_not_repeated(model, bundle, tmp_path, monkeypatch):
    without_graphs(monkeypatch)
    copy = shutil.copytree(bundle, tmp_path / "elsewhere" / "bundle")
    ok, detail = repeated(copy, lambda *_: pytest.fail("another model was read"))
    assert not ok and "from which it was made, does not exist" in detail
    source = Path(shutil.copytree(model.name_or_path, (copy / Bundle(copy).metadata["model"]["name"]).resolve()))
    config = json.loads((source / "config.json").read_text())
    config["weight_fingerprint"]["model.safetensors"] = "0" * 64
    (source / "config.json").write_text(json.dumps(config))
    ok, detail = repeated(copy, lambda *_: pytest.fail("another model was read"))
    assert not ok and "was saved again since" in detail


def test_a_failure_that_was_accepted_is_accepted_again(model, bundle, tmp_path, monkeypatch):
    without_graphs(monkeypatch)
    copy, facts = Path(shutil.copytree(bundle, tmp_path / "copy")), Bundle(bundle).metadata
    failed = {**facts["verdict"], "result": "failed", "accepted": False, "reasons": ["too much"]}
    for accepted in (False, True):
        origin = {**facts["model"], "name": model.name_or_path}
        changed = {**facts, "model": origin, "verdict": {**failed, "accepted": accepted}}
        (copy / "metadata.json").write_text(json.dumps(signed(changed)))
        ok, detail = repeated(copy, lambda *_: failed)
        assert ok == accepted and "too much" in detail
