"""`base_model`: the model without its LM head, which trainers run by themselves."""

import contextlib

import pytest
import torch
from tiny_genieblue import IMAGE, IMAGE_ID, left_pad, prompt, row, tiles, tiny_genieblue
from tiny_models import tiny_base
from torch import nn

from modeling_genieblue.backbone_genieblue import GenieBlueBackbone

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()


@pytest.fixture
def model():
    return tiny_genieblue()


def head_of(model, **inputs):
    return model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bluelm", "gemma3_text"])
def test_lm_head_makes_the_models_logits_of_it(family):
    model = tiny_genieblue(family)
    mixed = left_pad([prompt(10), REQUEST])
    with torch.no_grad():
        assert torch.equal(head_of(model, input_ids=prompt()), model.language_model(prompt()).logits)
        assert torch.equal(head_of(model, input_ids=REQUEST, pixel_values=PIXELS), model(REQUEST, PIXELS).logits)
        together = head_of(model, **mixed, pixel_values=PIXELS)
        assert torch.equal(together, model(**mixed, pixel_values=PIXELS).logits)


def test_it_has_the_models_own_parameters_and_no_more(model):
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in model.base_model.named_parameters()] == names
    assert all(one is other for one, other in zip(model.base_model.parameters(), model.parameters(), strict=True))
    assert isinstance(model.base_model, nn.Module)
    model.base_model.train()
    assert model.training and not model.language_model.training


def test_image_tokens_as_labels_train_nothing(model):
    """A collator may take all ids for labels, those of images too, which no row of the LM head stands for."""
    model.train()
    is_image = REQUEST == IMAGE_ID
    hidden_states = model.base_model(input_ids=REQUEST, pixel_values=PIXELS).last_hidden_state
    log_sums = model.get_output_embeddings()(hidden_states).logsumexp(-1)
    log_sums[:, :-1][is_image[:, 1:]].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(not gradient.any() for gradient in gradients)


def test_a_cache_is_refused(model):
    cache = model(prompt()).past_key_values
    with pytest.raises(ValueError, match="does not support `past_key_values`"):
        model.base_model(input_ids=prompt(), past_key_values=cache)


def test_decoder_is_the_bases(model):
    assert model.get_decoder() is model.language_model.model
    assert model.get_encoder("image") is model.vision_tower


METHODS = {
    "requires_grad_": lambda model: model.requires_grad_(True),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "apply": lambda model: model.apply(lambda part: [torch.nn.init.zeros_(p) for p in part.parameters(recurse=False)]),
    "load_state_dict": lambda model: model.load_state_dict({n: v + 1 for n, v in model.state_dict().items()}),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "train": lambda model: model.train(),
}


@pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
def test_methods_of_the_backbone_are_the_models_and_keep_the_base(call):
    model, expected = tiny_genieblue(), tiny_base("llama")
    with contextlib.suppress(ValueError):
        assert isinstance(call(model.base_model), (GenieBlueBackbone, tuple))
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    assert not model.language_model.training
    assert torch.equal(model.language_model(prompt()).logits, expected(prompt()).logits)
