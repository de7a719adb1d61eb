"""The base's configuration, not its weights alone: an edited one is refused, and what decides no logits may differ."""

import json

import pytest
import torch
from tiny_genieblue import save_tiny_pair
from tiny_quantized import large_pair, load, load_base, own_copy, quantized_pair, save_large_pair, trust_of

from conversion.verification.checks import CheckFailed
from conversion.verification.verify import SavedModel, check_base_files
from modeling_genieblue import GenieBlueForConditionalGeneration

ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def change_config(base, change) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def slow_rotation(config) -> None:
    if "rope_base" in config:  # of BlueLM
        config["rope_base"] = 500.0
        return
    rope = config["rope_parameters"]
    for settings in rope.values() if "full_attention" in rope else [rope]:
        settings["rope_theta"] = 500.0


def check_by_verify(folder, trust=False) -> str:
    return check_base_files(SavedModel(str(folder), None, None, {}, trust, "auto", None))


@pytest.mark.parametrize("family, options", [
    ("llama", {}), ("llama", {"rope_parameters": ROPE}), ("qwen2", {"rope_scaling": YARN}), ("phi3", {}),
    ("gemma3_text", {}), ("bluelm", {}),
], ids=str)  # fmt: skip
def test_edited_configuration_is_refused_and_an_untouched_one_is_not(family, options, tmp_path):
    folder, trust = save_large_pair(tmp_path, family, **options), trust_of(family)
    for dtype in (torch.float32, torch.bfloat16):
        load(folder, dtype=dtype, **trust)
    load(folder, attn_implementation="eager", **trust)
    assert "settings" in check_by_verify(folder, bool(trust))
    change_config(tmp_path / "base-llm", slow_rotation)
    with pytest.raises(ValueError, match="rope_.* 500"):
        load(folder, **trust)
    with pytest.raises(CheckFailed, match="rope_.* 500"):
        check_by_verify(folder, bool(trust))
    load(folder, check_base=False, **trust)


def test_edited_configuration_of_a_quantized_base_is_refused(tmp_path):
    folder = own_copy(quantized_pair(), tmp_path)
    assert "settings" in check_by_verify(folder / "genieblue")
    change_config(folder / "base", slow_rotation)
    with pytest.raises(ValueError, match="rope_parameters"):
        load(folder / "genieblue")
    with pytest.raises(CheckFailed, match="rope_parameters"):
        check_by_verify(folder / "genieblue")


def test_settings_that_change_no_logits_may_differ(tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = load_base(tmp_path / "base")
    base.config.use_cache, base.config.pad_token_id, base.config.attention_dropout = False, 5, 0.1
    base.config.max_position_embeddings, base.config.mine, base.config.name_or_path = 4096, 1, "somewhere/else"
    load(folder, base_model=base)
    harmless = {"transformers_version": "4.40.0", "architectures": ["X"], "_name_or_path": "x", "use_cache": False}
    change_config(tmp_path / "base", lambda config: config.update(harmless))
    load(folder)
    base.config.rms_norm_eps = 0.1
    with pytest.raises(ValueError, match="rms_norm_eps 0.1, expected 1e-06"):
        load(folder, base_model=base)


# A base of another kind


@pytest.mark.parametrize("mix", [{}, {"llm": "w16a16", "embeddings": "w8a16"}], ids=str)
def test_base_quantized_by_genieblue_is_refused_under_a_16_bit_genieblue(mix):
    base = quantized_pair(**mix) / "base"
    for given in (base, load_base(base)):
        with pytest.raises(ValueError, match="load the quantized GenieBlue"):
            load(large_pair(), base_model=given)
    model = load(large_pair(), base_model=base, check_base=False)
    assert isinstance(model, GenieBlueForConditionalGeneration)
