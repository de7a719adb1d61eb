"""The verdict of `quantize`: what is measured when, what a failed one leaves behind, and the error of each part."""

import json
import math
import shutil

import pytest
import torch
from tiny_quantized import (
    PIXELS,
    REQUEST,
    TEXT,
    large_pair,
    leftovers,
    load,
    quantize,
    quantized_pair,
    save_large_pair,
)

from conversion.quantization import quantize as quantize_module
from conversion.quantization.bases import record_verdict
from conversion.quantization.error import errors_by_part
from conversion.verdict import Limits, judge
from conversion.verification import verify, verify_quantized
from conversion.verification.verify import CHECKS, verify_model
from hub_cards.publish import find_problems, publish_folder
from hub_cards.publish_base import find_base_problems, publish_quantized_base
from hub_cards.verdicts import REFERENCES


class AlwaysLost:
    """Held-out data on which one view of a quantized model loses `points`."""

    def __init__(self, points: float, view: str = "multimodal", accept_loss: bool = False):
        self.points, self.view, self.accept_loss = points, view, accept_loss
        self.measured = []

    def measure(self, model):
        self.measured.append(type(model).__name__)
        return self.measured[-1]

    def logits(self, model):
        with torch.no_grad():
            return {"text": model(TEXT).logits[0], "multimodal": model(REQUEST, pixel_values=PIXELS).logits[0]}

    def verdict(self, before, after, error_by_part=None):
        assert (before, after) == ("GenieBlueForConditionalGeneration", "QuantizedGenieBlueForConditionalGeneration")
        lost = self.points / 100
        total = {"task": "all", "metric": "exact", "first": 0.9, "second": 0.9 - lost, "difference": -lost,
                 "standard_error": 0.01, "better": 0, "worse": 9, "count": 400}  # fmt: skip
        found = judge({self.view: {"answers": [total], "perplexity": []}}, Limits(), self.accept_loss)
        return found | {"data": [{"name": "mine.jsonl", "of": REFERENCES}], "error_by_part": error_by_part or {}}


def settings(folder, key="quantization"):
    return json.loads((folder / "config.json").read_text())[key]


def test_a_failed_verdict_is_written_everywhere_and_not_published(tmp_path):
    held_out = AlwaysLost(25)
    report = quantize(large_pair(), tmp_path, {"held_out": held_out}, llm="w8a16", rounding="rtn")
    assert report.verdict["result"] == "failed" and not report.verdict["accepted"]
    assert leftovers(tmp_path) == ["base", "genieblue"]
    assert settings(tmp_path / "genieblue")["verdict"] == report.verdict
    card = (tmp_path / "genieblue/README.md").read_text()
    assert "costs**: failed; the multimodal view's answers lose 25.0 ± 1.0 points, more than 3" in card
    assert "65.0 %, in 16 bits 90.0 % (-25.0 ± 1.0 points)" in card
    with pytest.raises(ValueError, match="Quantization costs too much: the multimodal view's answers lose 25"):
        publish_folder(tmp_path / "genieblue", "you/reader")
    # Its text view was not measured, so nothing speaks against the base.
    assert settings(tmp_path / "base", "quantization_config")["verdict"]["result"] == "not measured"


def test_a_failed_text_view_is_the_bases_too(tmp_path):
    quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(25, view="text")}, llm="w8a16", rounding="rtn")
    assert "costs**: failed; the text view's answers lose" in (tmp_path / "base/README.md").read_text()
    assert "| Answers of the text view: exact | 65.0 %, in 16 bits 90.0 %" in (tmp_path / "base/README.md").read_text()
    with pytest.raises(ValueError, match="Quantization costs too much: the text view"):
        publish_quantized_base(tmp_path / "base", "you/base")


def test_an_inner_base_records_it_as_well(tmp_path):
    options = {"held_out": AlwaysLost(25, view="text", accept_loss=True), "self_contained": True}
    quantize(large_pair(), tmp_path, options, llm="w8a16", rounding="rtn")
    inner = settings(tmp_path / "genieblue/base", "quantization_config")["verdict"]
    assert (inner["result"], inner["accepted"]) == ("failed", True)
    assert find_problems(tmp_path / "genieblue") == []
    assert load(tmp_path / "genieblue").config.quantization["verdict"]["accepted"]


def test_an_accepted_loss_is_marked_and_may_be_published(tmp_path):
    quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(25, accept_loss=True)}, llm="w8a16", rounding="rtn")
    assert "costs**: failed, accepted; the multi" in (tmp_path / "genieblue/README.md").read_text()
    assert not any("costs too much" in problem for problem in find_problems(tmp_path / "genieblue"))


def test_without_data_it_says_that_nothing_was_measured():
    verdict = settings(quantized_pair() / "genieblue")["verdict"]
    assert (verdict["result"], verdict["accepted"]) == ("not measured", True)
    for folder in ("genieblue", "base"):
        assert "costs**: not measured; no held-out data" in (quantized_pair() / folder / "README.md").read_text()


def test_a_bad_sample_is_named_before_anything_is_rounded(tmp_path, monkeypatch):
    held_out = AlwaysLost(0)
    monkeypatch.setattr(held_out, "measure", lambda model: (_ for _ in ()).throw(ValueError("held-out.jsonl:3")))
    with pytest.raises(ValueError, match="held-out.jsonl:3"):
        quantize(large_pair(), tmp_path / "new", {"held_out": held_out})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("errors", [{"text": 0.1, "multimodal": math.nan}, {"text": 0.1, "multimodal": 1.2}], ids=str)
def test_unrelated_logits_fail_without_data(errors, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_module, "measured_errors", lambda *_: (errors, []))
    report = quantize(large_pair(), tmp_path, llm="w8a16", rounding="rtn")
    assert (report.verdict["result"], report.verdict["accepted"]) == ("failed", False)
    assert report.verdict["reasons"][0].startswith("the logits of the multimodal view are unrelated")
    assert settings(tmp_path / "base", "quantization_config")["verdict"]["result"] == "not measured"


def test_unrelated_logits_may_be_accepted_which_verify_honours(check, tmp_path, monkeypatch):
    source = save_large_pair(tmp_path / "source")
    for module in (quantize_module, verify_quantized):
        monkeypatch.setattr(module, "measured_errors", lambda *_: ({"text": 1.3, "multimodal": 0.1}, []))
    report = quantize(source, tmp_path / "new", {"accept_loss": True}, llm="w8a16", rounding="rtn")
    assert (report.verdict["result"], report.verdict["accepted"]) == ("failed", True)
    assert settings(tmp_path / "new/base", "quantization_config")["verdict"]["accepted"]
    assert find_base_problems(tmp_path / "new/base") == []
    (found,) = check(tmp_path / "new/genieblue", "stock_peft")
    assert found.ok and "accepted: the logits of the text view are unrelated" in found.detail
    (found,) = check(tmp_path / "new/genieblue")
    assert found.ok and "failed, accepted" in found.detail
    config = tmp_path / "new/genieblue/config.json"
    config.write_text(config.read_text().replace('"accepted": true', '"accepted": false'))
    (found,) = check(tmp_path / "new/genieblue", "stock_peft")
    assert not found.ok and "the logits of the text view are unrelated" in found.detail


def test_a_model_that_overflows_is_refused_before_anything_is_rounded(tmp_path):
    source = save_large_pair(tmp_path / "source")
    model = load(source)
    model.vision_tower.post_layernorm.weight.data.fill_(1e9)  # infinite in float16
    model.save_pretrained(source)
    with pytest.raises(ValueError, match="in float16 are NaN or infinite.*--activations"):
        quantize(source, tmp_path / "new", activations="float16")
    assert not (tmp_path / "new").exists()


def test_the_error_by_part_is_of_each_part_alone(tmp_path):
    report = quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(0)}, lora="w16a16")
    parts = report.verdict["error_by_part"]
    assert set(parts) == {"vision_tower", "multi_modal_projector", "llm", "replicated_blocks"}
    assert all(parts[part]["text"] == 0 for part in parts if part != "llm")
    assert all(0 < errors["multimodal"] < 1 for errors in parts.values())
    assert parts["llm"]["text"] == pytest.approx(report.errors["text"], rel=1)


def test_measuring_by_part_changes_neither_model():
    exact, rounded = load(large_pair()), load(large_pair())
    with torch.no_grad():
        rounded.vision_tower.encoder.layers[0].mlp.fc1.weight.data.mul_(1.5)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (exact, rounded)]
    errors = errors_by_part(exact, rounded, AlwaysLost(0).logits)
    assert list(errors) == ["vision_tower"] and errors["vision_tower"]["multimodal"] > 0
    for model, states in zip((exact, rounded), before, strict=True):
        assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


@pytest.fixture
def check(monkeypatch):
    def only_verdict(folder, *names, **options):
        monkeypatch.setattr(verify, "CHECKS", {name: CHECKS[name] for name in names or ("verdict", "verdict_on_data")})
        return verify_model(folder, **options)

    return only_verdict


def test_verify_reports_the_recorded_verdict(check, tmp_path):
    quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(25)}, llm="w8a16", rounding="rtn")
    (found,) = check(tmp_path / "genieblue")
    assert not found.ok and found.detail.startswith("as recorded: failed; the multimodal view's answers lose 25.0")
    (found,) = check(quantized_pair() / "genieblue")
    assert found.ok and found.detail.startswith("as recorded: not measured")


@pytest.mark.parametrize("points, ok", [(0, True), (25, False)])
def test_verify_repeats_the_verdict_with_data(check, points, ok):
    recorded, found = check(quantized_pair() / "genieblue", held_out=AlwaysLost(points))
    assert recorded.ok and recorded.detail.startswith("as recorded: not measured")
    assert (found.name, found.ok) == ("verdict_on_data", ok)
    assert found.detail.startswith("against /") and "plain-llama/genieblue: " in found.detail


def test_verify_compares_with_no_other_model_that_took_the_place_of_the_first(check, tmp_path):
    source = save_large_pair(tmp_path)
    quantize(source, tmp_path / "new", llm="w8a16", rounding="rtn")
    model = load(source)
    model.multi_modal_projector.linear_1.bias.data += 1
    model.save_pretrained(source)
    held_out = AlwaysLost(0)
    _, found = check(tmp_path / "new/genieblue", held_out=held_out)
    assert not found.ok and "was saved again since, with other weights" in found.detail
    assert held_out.measured == []


def test_verify_keeps_what_was_accepted(check, tmp_path):
    quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(25, accept_loss=True)}, llm="w8a16", rounding="rtn")
    found = check(tmp_path / "genieblue", held_out=AlwaysLost(25))
    assert [each.ok for each in found] == [True, True] and all("failed, accepted" in each.detail for each in found)


def test_other_data_does_not_hide_a_recorded_failure(check, tmp_path):
    quantize(large_pair(), tmp_path, {"held_out": AlwaysLost(25)}, llm="w8a16", rounding="rtn")
    recorded, again = check(tmp_path / "genieblue", held_out=AlwaysLost(0))
    assert not recorded.ok and recorded.detail.startswith("as recorded: failed; the multimodal view's answers")
    assert again.ok


LOST = {"result": "failed", "accepted": False, "reasons": ["the text view loses 9 points"]}


@pytest.fixture
def lost_base(tmp_path):
    """A quantized base whose verdict failed."""
    base = shutil.copytree(quantized_pair(llm="w8a16", rounding="rtn") / "base", tmp_path / "lost-base")
    record_verdict(base, LOST)
    return base


def test_reusing_a_failed_base_is_warned_of_and_fails_verify(check, tmp_path, lost_base, caplog):
    options = {"quantized_base": lost_base}
    quantize(large_pair(), tmp_path / "new", options, llm="w8a16", rounding="rtn")
    assert f"{lost_base} lost too much by its verdict: the text view loses 9 points. " in caplog.text
    assert "quantize it anew with more bits" in caplog.text
    (found,) = check(tmp_path / "new/genieblue")
    assert not found.ok and "lost-base: failed; the text view loses 9 points" in found.detail
    assert "not measured" in found.detail


def test_reusing_a_failed_base_whose_loss_was_accepted_is_only_told(check, tmp_path, lost_base, caplog):
    record_verdict(lost_base, LOST | {"accepted": True})
    quantize(large_pair(), tmp_path / "new", {"quantized_base": lost_base}, llm="w8a16", rounding="rtn")
    assert "lost too much by its verdict, which was accepted: the text view loses 9 points." in caplog.text
    assert "anew" not in caplog.text
    (found,) = check(tmp_path / "new/genieblue")
    assert found.ok and "lost-base: failed, accepted; the text view loses 9 points" in found.detail


def test_the_report_says_what_the_text_view_of_a_reused_base_loses(tmp_path):
    recipe = {"llm": "w8a16", "rounding": "rtn"}
    options = {"held_out": AlwaysLost(25, view="text"), "quantized_base": quantized_pair(**recipe) / "base"}
    report = quantize(large_pair(), tmp_path, options, **recipe)
    assert report.on_reused_base["result"] == "failed"


def test_verify_takes_no_data_for_a_model_of_16_bits():
    with pytest.raises(ValueError, match="is not quantized"):
        verify_model(large_pair(), held_out=AlwaysLost(0))
