"""A base, a view or a part of ours that was changed from outside is named at the next request, or at a save."""

import copy

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny_genieblue import IMAGE, prompt, row, tiles, tiny_genieblue
from tiny_models import tiny_base
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from modeling_genieblue.frozen_base_genieblue import LANGUAGE_TREES

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()


@pytest.fixture
def model():
    return tiny_genieblue()


@pytest.mark.parametrize("tree", LANGUAGE_TREES)
def test_casting_of_a_part_of_the_base_is_noticed_at_the_next_request(tree, model):
    getattr(model, tree).model.layers[1].mlp.half()
    for request in (lambda: model(prompt()), lambda: model.generate(REQUEST, pixel_values=PIXELS)):
        with pytest.raises(ValueError, match="a part of it was cast to torch.float16"):
            request()


class CodedWeight(torch.Tensor):
    """A weight of another class, as torchao puts it in the place of a plain one."""


def zero_weights(module):
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


OTHER_NAMES = "Parameters of the base are missing, added or renamed"
# What changes a part of a base, or of the view over it, by a method of that part, and what is said of it.
CHANGES = {
    "initialised": (lambda tree: tree.model.layers.apply(zero_weights), "layers.0.* contains 0, expected"),
    "emptied": (lambda tree: tree.model.layers[0].mlp.to_empty(device="cpu"), "layers.0.mlp.* contains"),
    "written": (lambda tree: nn.init.ones_(tree.lm_head.weight), "lm_head.weight contains 1, expected"),
    "another weight": (
        lambda base: setattr(base.lm_head, "weight", nn.Parameter(torch.zeros(128, 32))), "lm_head.weight contains"
    ),
    "another module": (
        lambda base: setattr(base.model.layers[1].mlp, "act_fn", nn.ReLU()),
        "model.layers.1.mlp.act_fn is now a torch.nn.*ReLU",
    ),
    "a module less": (lambda base: delattr(base.model.layers[1], "input_layernorm"), "layers.1 lacks a module"),
    "more tokens": (
        lambda base: base.resize_token_embeddings(140, mean_resizing=False),
        "lm_head is now a .*Linear|embed_tokens.weight has shape .140, 32., expected .128, 32.",
    ),
    "pruned": (lambda base: prune.random_unstructured(base.lm_head, "weight", 0.5), OTHER_NAMES),
    "reparametrized": (lambda base: spectral_norm(base.lm_head), OTHER_NAMES),
    "quantized by quanto": (lambda base: quantize(base, weights=qint8), "is now a optimum.quanto.*QLinear"),
    "quantized by torch": (
        lambda base: torch.ao.quantization.quantize_dynamic(base, inplace=True), "is now a torch.*dynamic.*Linear"
    ),
    "quantized in place": (
        lambda base: setattr(
            base.lm_head, "weight", nn.Parameter(base.lm_head.weight.detach().as_subclass(CodedWeight), False)
        ),
        "is now a CodedWeight: it was quantized",
    ),
    "LoRA": (lambda base: get_peft_model(base, LoraConfig(target_modules=["q_proj"])), "q_proj is now a peft"),
}  # fmt: skip
OF_BOTH_TREES = ("initialised", "emptied", "written")
TRIALS = [(change, tree) for change in CHANGES for tree in (LANGUAGE_TREES if change in OF_BOTH_TREES
                                                            else LANGUAGE_TREES[:1])]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "tree"), TRIALS)
def test_change_of_a_part_of_the_base_is_noticed_at_the_next_request_and_at_a_save(change, tree, model, tmp_path):
    model(prompt())
    act, said = CHANGES[change]
    act(getattr(model, tree))
    for request in (
        lambda: model(prompt()),
        lambda: model.generate(REQUEST, pixel_values=PIXELS),
        lambda: model.save_pretrained(tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=f"(?s)({said}).*`from_base`"):
            request()
    assert not (tmp_path / "new").exists()


def test_quantizing_the_whole_model_from_outside_is_noticed_by_name(model, tmp_path):
    quantize(model, weights=qint8)
    for request in (lambda: model(prompt()), lambda: model.save_pretrained(tmp_path / "new")):
        with pytest.raises(ValueError, match="QLinear: .*`genieblue quantize`"):
            request()


@pytest.mark.parametrize("tree", LANGUAGE_TREES)
@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.lm_head.half().float(),
        lambda tree: tree.model.layers.apply(
            lambda module: [parameter.data.zero_() for parameter in module.parameters(recurse=False)]
        ),
    ],
    ids=["cast and back", "zeroed"],
)
def test_change_that_may_leave_no_trace_is_noticed_at_a_save(change, tree, model, tmp_path):
    change(getattr(model, tree))
    with pytest.raises(ValueError, match="The base is not as it was .* contains"):
        model.save_pretrained(tmp_path / "new")


PARTS = {
    "tower": lambda model: model.vision_tower,
    "projector": lambda model: model.multi_modal_projector,
    "view": lambda model: model.multimodal_language_model,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "act",
    [lambda part: (quantize(part, weights=qint8), freeze(part)),
     lambda part: torch.ao.quantization.quantize_dynamic(part, inplace=True)], ids=["quanto", "torch"])  # fmt: skip
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_part_that_was_quantized_from_outside_is_not_saved(part, act, model, tmp_path):
    """A save could not be loaded again, and would have taken the place of one that can."""
    act(part(model))
    with pytest.raises(ValueError, match="`genieblue quantize`"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_base_whose_values_are_the_same_serves_on(model):
    expected = model(prompt()).logits
    base = model.language_model
    base.load_state_dict(base.state_dict())
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
    model.share_memory()
    for served in (model, copy.deepcopy(model)):
        assert torch.equal(served(prompt()).logits, expected)


def test_next_token_of_a_request_does_not_look_at_the_base_again(model, monkeypatch):
    ids = prompt()
    cache = model(ids, use_cache=True).past_key_values
    monkeypatch.setattr(model._as_built, "check_request", lambda *_: pytest.fail("looked"))
    model(ids[:, -1:], past_key_values=cache)


def test_base_that_is_set_to_train_is_refused_in_training(model):
    for parameter in model.parameters():
        parameter.requires_grad = True
    model(REQUEST, pixel_values=PIXELS)
    for part in (model.train(), model.base_model):
        with pytest.raises(ValueError, match="`model.language_model.requires_grad_\\(False\\)`"):
            part(REQUEST, pixel_values=PIXELS)
    model.language_model.requires_grad_(False)
    model(REQUEST, pixel_values=PIXELS, labels=REQUEST).loss.backward()


def test_casting_of_the_base_itself_is_noticed_at_the_next_request():
    model = tiny_genieblue(base=tiny_base("llama", dtype=torch.bfloat16))
    prepare_model_for_kbit_training(model.language_model)
    for request in (lambda: model(prompt()), lambda: model.generate(REQUEST, pixel_values=PIXELS)):
        with pytest.raises(ValueError, match="was cast to torch.float32, .*prepare_model_for_kbit"):
            request()
