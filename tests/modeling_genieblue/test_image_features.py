"""Image features in the form in which all of transformers gives them."""

import pytest
import torch
from tiny_genieblue import IMAGE, row, tiles, tiny_genieblue
from transformers.modeling_outputs import BaseModelOutputWithPooling

PIXELS = tiles(2)


@pytest.fixture(scope="module")
def model():
    return tiny_genieblue()


def test_they_are_the_pooler_output_of_the_towers_output(model):
    outputs = model.get_image_features(PIXELS)
    assert type(outputs) is BaseModelOutputWithPooling
    assert outputs.last_hidden_state.shape == (2, 9, 32)
    assert torch.equal(outputs.pooler_output, model.multi_modal_projector(outputs.last_hidden_state))
    assert outputs.hidden_states is None
    assert len(model.get_image_features(PIXELS, output_hidden_states=True).hidden_states) == 3


def test_a_tuple_is_given_where_one_is_asked_for(model, monkeypatch):
    features = model.get_image_features(PIXELS, return_dict=True).pooler_output
    assert torch.equal(model.get_image_features(PIXELS, return_dict=False)[1], features)
    monkeypatch.setattr(model.config, "return_dict", False)
    assert isinstance(model.get_image_features(PIXELS), tuple)


def test_placeholder_mask_says_where_they_go(model):
    ids = row(5, IMAGE, 9, IMAGE)
    features = model.get_image_features(PIXELS).pooler_output
    embeds = torch.zeros(*ids.shape, 32)
    mask = model.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
    assert torch.equal(mask[..., 0], ids == model.config.image_token_id)
    assert torch.equal(embeds.masked_scatter(mask, features)[0, 1:5], features[0])
    with pytest.raises(ValueError, match="tokens: 8, features: 4"):
        model.get_placeholder_mask(ids, embeds, features[:1])


def test_unused_head_of_the_tower_does_not_train(model):
    head = list(model.vision_tower.head.parameters())
    assert head and not any(parameter.requires_grad for parameter in head)
    others = [name for name, _ in model.vision_tower.named_parameters() if not name.startswith("head.")]
    assert all(model.vision_tower.get_parameter(name).requires_grad for name in others)


def test_rows_padded_on_the_right_are_generated_as_alone(model):
    """Pipelines pad a batch as the base's tokenizer is set."""
    short, long = row(5, IMAGE, 9), row(6, IMAGE, 9, 40, 41, 42)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    alone = [model.generate(ids, pixel_values=PIXELS[[i]], **options)[0, -5:] for i, ids in enumerate((short, long))]
    missing = long.shape[1] - short.shape[1]
    ids = torch.cat([torch.nn.functional.pad(short, (0, missing)), long])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(short), (0, missing)), torch.ones_like(long)])
    together = model.generate(ids, attention_mask=mask, pixel_values=PIXELS, **options)
    assert [*map(torch.Tensor.tolist, together[:, -5:])] == [*map(torch.Tensor.tolist, alone)]
