"""Rounding of a decoder's matrices: groups, GPTQ, equal codes of both views, and which matrices get 8 bits."""

import numpy as np
import pytest
import torch
from tiny_qnn import CHUNK, CONTEXT, embeddings_and_logits, tiny_model

from conversion.qnn.graphs.decoder_shape import make_decoder_shape
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.block_rounding import round_blocks
from conversion.qnn.qdq.encoding import WeightFormat
from conversion.qnn.qdq.matrix_rounding import output_error, round_matrix
from conversion.qnn.qdq.precision_plan import Damage, PrecisionPlan, choose_eight_bits, measure_damage
from conversion.qnn.stored_size import matrix_weights

GROUPS = WeightFormat(4, 32)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs():
    return gaussian(400, 64, seed=1) @ (torch.eye(64) + 0.3 * gaussian(64, 64, seed=2))


def test_a_group_has_a_small_multiple_of_its_channel_s_scale():
    weight = gaussian(128, 5) * torch.tensor([1.0, 10, 0.1, 3, 1e-12])
    weight[:32] *= 8
    found = round_matrix(weight, GROUPS)
    assert found.multiples.shape == (4, 5) and found.multiples.dtype == np.uint8
    assert found.multiples.min() >= 1 and found.multiples.max() == 16
    assert found.format == GROUPS and np.abs(found.codes).max() == 7
    relative = np.linalg.norm(found.decode() - weight.numpy()) / np.linalg.norm(weight)
    assert relative < np.linalg.norm(round_matrix(weight, WeightFormat(4)).decode() - weight.numpy()) / weight.norm()
    assert relative < 0.12


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest():
    x, weight = correlated_inputs(), gaussian(64, 48)
    hessian = x.t() @ x
    nearest, better = round_matrix(weight, GROUPS), round_matrix(weight, GROUPS, hessian)
    assert output_error(weight, better, hessian) < 0.7 * output_error(weight, nearest, hessian)


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.ones(64, 64)])
def test_inputs_that_were_never_seen_or_always_equal_are_rounded_all_the_same(hessian):
    weight = gaussian(64, 48)
    found = round_matrix(weight, WeightFormat(8), hessian.clone())
    assert np.abs(found.decode() - weight.numpy()).mean() < 0.1


def test_damaged_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_matrix(torch.full((32, 2), torch.nan), GROUPS)


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model("llama")
    shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
    rotation = Rotation(shape.hidden_size)
    views = {"text": model.language_model, "multimodal": model.multimodal_language_model}
    streams = {
        view: [
            rotation.states(torch.from_numpy(embeddings_and_logits(model, view, 30, seed=seed)[0])).numpy()
            for seed in range(3)
        ]
        for view in views
    }
    return model, views, shape, streams, rotation


def test_matrices_of_both_views_get_equal_codes_and_replicated_ones_their_own(tiny):
    model, views, shape, streams, rotation = tiny
    plan = PrecisionPlan(GROUPS, {0: ["down_proj.weight"]})
    codes = round_blocks(views, shape, range(4), streams, rotation, plan, gptq=True)
    copied = tuple(f"blocks.{index}." for index in model.config.replicated_layers)
    for name, weight in codes["text"].items():
        same = np.array_equal(weight.codes, codes["multimodal"][name].codes)
        assert same == (not name.startswith(copied)), name
    formats = {name: weight.format for name, weight in codes["text"].items()}
    assert formats.pop("blocks.0.down_proj.weight") == WeightFormat(8)
    assert set(formats.values()) == {GROUPS} and "head.weight" in formats
    lora = {weight.format for name, weight in codes["multimodal"].items() if "lora" in name}
    assert lora == {WeightFormat(8)} and not [name for name in codes["text"] if "lora" in name]


def test_the_codes_of_a_part_are_those_of_the_whole_model(tiny):
    _, views, shape, streams, rotation = tiny
    plan = PrecisionPlan(GROUPS, {})
    whole = round_blocks(views, shape, range(2), streams, rotation, plan, gptq=True)
    first = round_blocks(views, shape, range(1), streams, rotation, plan, gptq=True)
    assert all(np.array_equal(weight.codes, whole["text"][name].codes) for name, weight in first["text"].items())


def test_damage_is_measured_for_every_matrix_of_the_base(tiny):
    model, views, shape, streams, rotation = tiny
    copied = model.config.replicated_layers
    damages = measure_damage(views, shape, streams, rotation, GROUPS, copied)
    by_block = [sum(each.weights for each in damages if each.index == index) for index in range(shape.num_blocks + 1)]
    assert sum(by_block) == matrix_weights(model) and by_block[copied[0]] == 2 * by_block[0]
    assert len(damages) == 7 * shape.num_blocks + 1
    assert all(0 < damage.error < 1 for damage in damages)
    assert (damages[-1].index, damages[-1].name) == (shape.num_blocks, "head.weight")


def test_8_bits_go_where_a_byte_saves_most_damage_until_the_average_is_reached():
    damages = [
        Damage(0, "a", 100, 0.5),
        Damage(0, "b", 1000, 0.6),
        Damage(1, "a", 100, 0.1),
        Damage(2, "head", 800, 0.9),
    ]
    assert choose_eight_bits(damages, GROUPS, 2000 * 4.25) == {}
    assert choose_eight_bits(damages, GROUPS, 2000 * 4.5) == {0: ["a"]}
    assert choose_eight_bits(damages, GROUPS, 2000 * 6.2) == {0: ["a"], 1: ["a"], 2: ["head"]}
    assert choose_eight_bits(damages, GROUPS, 2000 * 8.0) == {0: ["a", "b"], 1: ["a"], 2: ["head"]}
