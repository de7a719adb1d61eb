"""The paper's trainable counts: computed on meta-device modules, compared to the printed digits."""

import pytest

from genieblue.lab.parameters import PRESETS, count_trainable
from genieblue.lab.structures import KINDS

# Printed in the paper's structure tables, in millions.
PRINTED = {
    "bluelm-3b": {"full": "3161.26", "lora": "458.06", "cogvlm": "1005.69", "genieblue": "1005.73"},
    "qwen2.5-3b": {"full": "3527.81", "lora": "456.84", "cogvlm": "1146.75", "genieblue": "1146.79"},
}
# Two digits further, so that a structure which is off by a few norms cannot pass.
RECOMPUTED = {
    "bluelm-3b": {"full": "3161.2575", "lora": "458.0588", "cogvlm": "1005.6940", "genieblue": "1005.7350"},
    "qwen2.5-3b": {"full": "3527.8091", "lora": "456.8372", "cogvlm": "1146.7516", "genieblue": "1146.7884"},
}


@pytest.fixture(scope="module")
def counted():
    return {
        (preset, structure): count_trainable(preset, structure) for preset in PRINTED for structure in PRINTED[preset]
    }


@pytest.mark.parametrize("structure", KINDS)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_counts_equal_the_papers_digits(counted, preset, structure):
    millions = counted[preset, structure]["trainable_parameters"] / 1e6
    assert f"{millions:.2f}" == PRINTED[preset][structure]
    assert f"{millions:.4f}" == RECOMPUTED[preset][structure]


def test_parts_add_up_and_are_those_of_the_structure(counted):
    for (_, structure), count in counted.items():
        assert sum(count["parts"].values()) == count["trainable_parameters"]
        language_parts = set(count["parts"]) - {"vision_tower", "multi_modal_projector"}
        assert (
            language_parts
            == {
                "full": {"language_model"},
                "lora": {"lora"},
                "cogvlm": {"visual_experts", "lora"},
                "genieblue": {"replicated_blocks", "lora"},
            }[structure]
        )


def test_the_bases_have_their_published_sizes(counted):
    assert counted["bluelm-3b", "full"]["parts"]["language_model"] == 2_714_667_520
    assert counted["qwen2.5-3b", "full"]["parts"]["language_model"] == 3_085_938_688
    assert counted["bluelm-3b", "full"]["parts"]["vision_tower"] == 428_225_600


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("structure", ["cogvlm", "genieblue"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_placement_moves_the_copies_but_not_the_count(counted, preset, structure, placement):
    assert count_trainable(preset, structure, placement) == counted[preset, structure]


def test_lora_grows_with_its_rank_and_copies_do_not(counted):
    of_rank_8 = counted["qwen2.5-3b", "genieblue"]["parts"]
    of_rank_16 = count_trainable("qwen2.5-3b", rank=16)["parts"]
    assert of_rank_16 == of_rank_8 | {"lora": 2 * of_rank_8["lora"]}


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ({"preset": "bluelm-70b"}, "bluelm-3b, qwen2.5-3b"),
        ({"preset": "bluelm-3b", "structure": "moe"}, "full, lora, cogvlm, genieblue"),
        ({"preset": "bluelm-3b", "placement": "middle"}, "skip, pre, post"),
        ({"preset": "bluelm-3b", "structure": "full", "placement": "middle"}, "skip, pre, post"),
    ],
)
def test_a_wrong_name_is_refused_with_the_choices(arguments, choices):
    with pytest.raises(ValueError, match=choices):
        count_trainable(**arguments)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        count_trainable("bluelm-3b", rank=0)
