"""A bundle's base: its values in a model that is trained on them, and its codes in another export."""

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

from tiny_qnn import CHUNK, CONTEXT, SETTINGS, requests, save_pair
from transformers import AutoModelForCausalLM

from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.bundle_base import BundleBase, put_on_bundle
from conversion.qnn.export import export_bundle
from conversion.qnn.qdq.language import LanguageSettings
from conversion.qnn.verdict import bundle_logits
from modeling_genieblue import GenieBlueForConditionalGeneration

GROUPS = {**SETTINGS, "llm": "mixed", "bits_per_weight": 5.0}


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def pair(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="module")
def bundle(pair, tmp_path_factory):
    """In two parts, to be read only."""
    out = tmp_path_factory.mktemp("out") / "bundle"
    return export_bundle(pair, out, calibration=requests(), parts=2, **GROUPS)


@pytest.mark.slow
def test_both_views_stand_on_the_values_of_the_bundle(pair, bundle):
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    facts = put_on_bundle(model, bundle)
    ids = torch.tensor([requests(1)[0]["input_ids"]])
    (found,) = bundle_logits(Bundle(bundle), "text", [_rotated(model, bundle, ids)])
    with torch.no_grad():
        expected = model.language_model(input_ids=ids, use_cache=False).logits[0].numpy()
    assert abs(found - expected).max() < 0.01 * abs(expected).max()  # 16 bits of the activations are left
    head = model.language_model.get_output_embeddings().weight
    assert model.multimodal_language_model.get_output_embeddings().weight is head
    assert facts["quantized base"].startswith("bundle, sha256 ")


def _rotated(model, bundle, ids):
    from conversion.qnn.graphs.rotation import Rotation

    embeddings = model.language_model.get_input_embeddings()(ids)[0].detach()
    return Rotation(Bundle(bundle).decoder.hidden_size).states(embeddings).numpy()


@pytest.mark.slow
def test_an_export_on_a_bundle_has_the_codes_of_its_base(pair, bundle, tmp_path, caplog):
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    put_on_bundle(model, bundle)
    with torch.no_grad():
        for name, value in model.multimodal_language_model.named_parameters():
            if ".lora_B." in name or ".modules_to_save." in name:
                value.mul_(1.1)
    model.save_pretrained(pair.parent / "healed")
    original = AutoModelForCausalLM.from_pretrained(pair.parent / "base")
    healed = GenieBlueForConditionalGeneration.from_pretrained(pair.parent / "healed")
    assert all(map(torch.equal, healed.language_model.parameters(), original.parameters()))
    settings = {name: value for name, value in GROUPS.items() if name != "bits_per_weight"}
    with caplog.at_level(logging.WARNING):
        out = export_bundle(
            pair.parent / "healed", tmp_path / "out", calibration=requests(), quantized_base=bundle, **settings
        )
    first, second = (BundleBase(path, healed.config.base_model_fingerprint) for path in (bundle, out))
    linears = [f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    names = [(2, "head.weight"), *((index, name) for index in range(2) for name in linears)]
    assert all((first.codes(*name).codes == second.codes(*name).codes).all() for name in names)
    assert first.digest == second.digest
    facts = [Bundle(path).metadata for path in (bundle, out)]
    assert facts[0]["eight_bits"] == facts[1]["eight_bits"] and facts[0]["adapter"] != facts[1]["adapter"]


@pytest.mark.slow
def test_a_bundle_of_another_base_or_in_other_formats_is_refused(pair, bundle, tmp_path):
    with pytest.raises(ValueError, match="keep the bits of `quantized_base`"):
        export_bundle(pair, tmp_path / "out", calibration=requests(), quantized_base=bundle, **GROUPS)
    fingerprint = GenieBlueForConditionalGeneration.config_class.from_pretrained(pair).base_model_fingerprint
    with pytest.raises(ValueError, match="was not made from this model's base"):
        BundleBase(bundle, {"model.safetensors": "0" * 64})
    settings = LanguageSettings(CHUNK, CONTEXT, 16, "constants")
    base = BundleBase(bundle, fingerprint)
    with pytest.raises(ValueError, match=r"has mixed \(4 bits, groups of 32\), but w8a16 \(8 bits\) was requested"):
        base.plan(replace(settings, llm="w8a16"))
    assert base.plan(replace(settings, llm="mixed")).eight_bits
