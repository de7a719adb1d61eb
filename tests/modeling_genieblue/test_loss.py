"""A training pass whose head reads labelled positions alone gives the loss and gradients of the whole pass."""

import pytest
import torch
from tiny_genieblue import IMAGE, row, tiles, tiny_genieblue
from tiny_models import FAMILIES

from modeling_genieblue.language_adapter_genieblue import adapter_parameters


def batch(model):
    ids = torch.cat([row(range(7, 12), IMAGE, range(20, 27)), row(range(30, 46))])
    labels = ids.clone()
    labels[0, :-3], labels[1, :-5], labels[1, -2] = -100, -100, -100
    return {"input_ids": ids, "pixel_values": tiles(1), "labels": labels}


def loss_and_gradients(model, inputs, **options):
    model.train()
    model.requires_grad_(True)
    model.zero_grad()
    outputs = model(**inputs, **options)
    outputs.loss.backward()
    parameters = [each for _, _, each in adapter_parameters(model.multimodal_language_model)]
    parameters += [*model.multi_modal_projector.parameters()]
    return outputs, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family):
    model = tiny_genieblue(family)
    inputs = batch(model)
    whole, expected = loss_and_gradients(model, inputs)
    outputs, gradients = loss_and_gradients(model, inputs, keep_logits=False)
    torch.testing.assert_close(outputs.loss, whole.loss, rtol=1e-6, atol=1e-6)
    assert len(gradients) == len(expected) > 10
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert outputs.logits is None


def test_the_head_reads_only_positions_that_predict_a_label():
    model = tiny_genieblue()
    shapes = []
    model.multimodal_language_model.get_output_embeddings().register_forward_hook(
        lambda _head, _args, logits: shapes.append(tuple(logits.shape[:-1]))
    )
    loss_and_gradients(model, batch(model), keep_logits=False)
    assert shapes == [(7,)]  # 3 and 5, less the one that is ignored
    with torch.no_grad():
        model.eval()(batch(model)["input_ids"], pixel_values=tiles(1), view="multimodal")
    assert shapes[1:] == [(2, 16)]  # and nothing of it stays


def test_the_sum_over_items_is_that_of_the_whole_batch():
    model = tiny_genieblue()
    inputs = {**batch(model), "num_items_in_batch": torch.tensor(20)}
    whole, _ = loss_and_gradients(model, inputs)
    outputs, _ = loss_and_gradients(model, inputs, keep_logits=False)
    torch.testing.assert_close(outputs.loss, whole.loss)


def test_a_loss_of_the_users_gets_all_logits():
    model = tiny_genieblue()
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + float(logits.shape[1])
    outputs, _ = loss_and_gradients(model, batch(model), keep_logits=False)
    assert float(outputs.loss.detach()) == 16
