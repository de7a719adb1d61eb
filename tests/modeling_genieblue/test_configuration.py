"""The configuration: which blocks are copied, and what is refused before anything is built."""

import json

import pytest
from tiny_genieblue import save_tiny_pair
from transformers import LlamaConfig

from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration
from modeling_genieblue.configuration_genieblue import select_replicated_layers


def make_config(**options) -> GenieBlueConfig:
    return GenieBlueConfig(text_config=LlamaConfig(num_hidden_layers=8, vocab_size=99), **options)


@pytest.mark.parametrize(
    ("placement", "layers"), [("skip", [3, 7, 11, 15]), ("pre", [0, 1, 2, 3]), ("post", [12, 13, 14, 15])]
)
def test_a_quarter_of_the_blocks_is_replicated(placement, layers):
    assert select_replicated_layers(16, placement) == layers


def test_skip_is_every_quarter_interval_of_a_depth_that_four_does_not_divide():
    assert select_replicated_layers(30, "skip") == [3, 7, 11, 15, 19, 23, 27]


@pytest.mark.parametrize(("blocks", "placement"), [(3, "skip"), (16, "middle")])
def test_what_has_no_quarter_is_refused(blocks, placement):
    with pytest.raises(ValueError, match="at least 4 blocks|choose one of skip, pre, post"):
        select_replicated_layers(blocks, placement)


def test_the_paper_s_vision_tower_gives_196_tokens_a_tile():
    assert make_config(vision_config={"image_size": 384, "patch_size": 14}).image_seq_length == 196


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicated_layers": [3, 3]}, "names a block twice"),
        ({"replicated_layers": [8]}, "blocks 0 to 7 only"),
        ({"replicated_layers": list(range(8))}, "at least one of each"),
        ({"replicated_layers": [3.5]}, "expected a list of block indices"),
        ({"replicated_layers": 3}, "replicated_layers"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"lora_rank": "8"}, "lora_rank"),
        ({"downsample_factor": -2}, "downsample_factor"),
        ({"image_token_id": "99"}, "image_token_id"),
        ({"image_seq_length": 5}, "a tile of this vision tower gives"),
        ({"vision_config": {"model_type": "llama"}}, "expected 'siglip_vision_model'"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_config(**options)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"lora_alpha": 32}, "lora_alpha 16, config.json means 32"),
        ("language_adapter/adapter_config.json", {"r": 5}, "has r 5"),
        ("language_adapter/adapter_config.json", {"use_rslora": True}, "has use_rslora True"),
        ("language_adapter/adapter_config.json", {"alpha_pattern": {"q_proj": 64}}, "has alpha_pattern .*64"),
        ("config.json", {"image_token_id": 5}, "which is a token of the base"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_load(tmp_path, file, change, message):
    folder = save_tiny_pair(tmp_path)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        GenieBlueForConditionalGeneration.from_pretrained(folder)


def test_folder_of_another_model_is_named(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json of {tmp_path} is the configuration of a 'llama' model"):
        GenieBlueConfig.from_pretrained(tmp_path)
