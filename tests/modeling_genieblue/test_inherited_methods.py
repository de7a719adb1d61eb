"""Every public name that a GenieBlue inherits acts on what is ours, leaves the base alone, or is refused by name."""

import copy
import inspect
import io

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from portrait import portrait
from tiny_genieblue import IMAGE, left_pad, prompt, row, tiles, tiny_genieblue
from tiny_models import tiny_base
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.integrations import PeftAdapterMixin

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.frozen_base_genieblue import REFUSALS
from modeling_genieblue.frozen_view_genieblue import VIEW_REFUSALS
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()

# Defined by GenieBlue itself; other tests say what they do.
OURS = """
apply base_model base_model_prefix config_class destroy_cached_continuous_batching_manager
disable_input_require_grads embed_request enable_input_require_grads forward from_base from_pretrained from_vlm
generate make_processor own_modules processor_class processor_map
generation_config get_decoder get_experts_implementation get_image_features get_input_embeddings
get_output_embeddings get_placeholder_mask hqq_quantized input_modalities loss_function main_input_name push_to_hub
requires_grad_ save_pretrained set_attn_implementation set_experts_implementation set_submodule
supports_gradient_checkpointing tie_weights train warn_if_padding_and_no_attention_mask
"""
# Read, or report, and change nothing.
READ_ONLY = """
T_destination buffers call_super_init can_generate can_record_outputs children compute_transition_scores
device dtype dummy_inputs dump_patches ep_plan eval extra_repr fsdp_plan fsdp_size generation_config_class get_buffer
get_compiled_call get_correct_attn_implementation get_correct_experts_implementation get_encoder
get_expanded_tied_weights_keys get_extra_state get_init_context get_memory_footprint get_parameter
get_parameter_or_buffer get_submodule heal_tokens is_activation_checkpointing is_backend_compatible is_custom_code
is_distributed_loading_by_transformers is_gradient_checkpointing is_remote_code load_custom_generate
model_tags modules named_buffers named_children named_modules named_non_persistent_buffers named_parameters
num_parameters output_modalities parameters pp_plan prepare_inputs_for_generation retrieve_modules_from_names
should_save_on_this_rank state_dict supports_context_parallel supports_pp_plan supports_tp_plan tp_plan tp_size
use_kernels
"""
# Through `_apply`, which moves the base and never casts it.
MOVES_AND_CASTS = "bfloat16 cpu cuda double float half ipu mtia share_memory to type xpu"
# Change what is ours or this object alone; `load_state_dict` by hooks.
KEEP_THE_BASE = """
activation_checkpointing_disable activation_checkpointing_enable add_model_tags add_module compile
gradient_checkpointing_disable gradient_checkpointing_enable load_state_dict register_backward_hook register_buffer
register_for_auto_class register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook set_extra_state zero_grad
"""
# Steps of `from_pretrained`, `generate` and `save_pretrained` of transformers, which have no effect by themselves.
INTERNAL = """
adjust_generation_fn barrier_after_gathered_checkpoint_save
gather_sharded_state_dict_for_save init_parallel_plans mark_tied_weights_as_initialized maybe_distribute_model
prepare_distribute_model
"""
REFUSED = """
active_adapters add_adapter continuous_batching_context_manager delete_adapter dequantize disable_adapters
enable_adapters enable_peft_hotswap generate_batch get_adapter_state_dict get_position_embeddings
init_continuous_batching init_weights initialize_weights load_adapter post_init resize_position_embeddings
resize_token_embeddings save_distributed_checkpoint set_adapter set_decoder set_encoder set_input_embeddings
set_output_embeddings set_use_kernels smart_apply to_empty
"""
DECISIONS = {
    name: decision
    for decision, names in {
        "ours": OURS, "read": READ_ONLY, "moves": MOVES_AND_CASTS, "keeps": KEEP_THE_BASE, "internal": INTERNAL,
        "refused": REFUSED,
    }.items()
    for name in names.split()
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged():
    """A model that a test must not change, and its portrait."""
    model = tiny_genieblue()
    model(REQUEST, pixel_values=PIXELS)
    return model, portrait(model)


@pytest.fixture
def model():
    return tiny_genieblue()


# The table


def test_every_inherited_name_has_a_decision():
    """A new version of a library cannot add one unseen."""
    kinds = GenieBlueForConditionalGeneration.__mro__
    names = {name for kind in kinds for name in vars(kind) if name[0] != "_"}
    assert {PreTrainedModel, PeftAdapterMixin, GenerationMixin, nn.Module} <= set(kinds)
    assert not sorted(names - set(DECISIONS))
    assert len(DECISIONS) == sum(len(names.split()) for names in (OURS, READ_ONLY, MOVES_AND_CASTS, KEEP_THE_BASE,
                                                                 INTERNAL, REFUSED))  # fmt: skip
    own = {name for kind in GenieBlueForConditionalGeneration.__mro__ if kind.__module__.startswith("modeling_g")
           for name in vars(kind) if name[0] != "_"}  # fmt: skip
    assert not sorted(own - {name for name, decision in DECISIONS.items() if decision in ("ours", "refused", "moves")})
    assert set(REFUSALS) == set(REFUSED.split())


@pytest.mark.parametrize("name", sorted(REFUSED.split()))
def test_refused_method_says_what_to_do_and_changes_nothing(name, unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match=f"`{name}` is refused for a GenieBlue: .{{30}}"):
        getattr(model, name)()
    assert portrait(model) == before


CALLS = {
    "zero_grad": lambda model: model.zero_grad(),
    "share_memory": lambda model: model.share_memory(),
    "tie_weights": lambda model: model.tie_weights(),
    "cpu": lambda model: model.cpu(),
    "to its own precision": lambda model: model.to("cpu", torch.float32),
    "float": lambda model: model.float(),
    "type": lambda model: model.type(torch.float32),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "activation_checkpointing": lambda model: (
        model.activation_checkpointing_enable(), model.activation_checkpointing_disable()
    ),
    "warn_if_padding": lambda model: model.warn_if_padding_and_no_attention_mask(prompt(), None),
    "get_init_context": lambda model: model.get_init_context(torch.float32, False, False, None),
    "get_compiled_call": lambda model: model.get_compiled_call(None),
    "init_parallel_plans": lambda model: model.init_parallel_plans(),
    "set_attn_implementation": lambda model: model.set_attn_implementation("sdpa"),
    "set_experts_implementation": lambda model: model.set_experts_implementation("eager"),
    "prepare_inputs": lambda model: model.prepare_inputs_for_generation(prompt()),
    "eval": lambda model: model.eval(),
    "get_memory_footprint": lambda model: model.get_memory_footprint(),
    "num_parameters": lambda model: model.num_parameters(only_trainable=True, exclude_embeddings=True),
    "expanded_tied_weights": lambda model: model.get_expanded_tied_weights_keys(all_submodels=True),
    "destroy_cached": lambda model: model.destroy_cached_continuous_batching_manager(),
    "add_hooks": lambda model: model.register_forward_hook(lambda *_: None).remove(),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_allowed_method_leaves_everything_as_it_was(call, unchanged):
    model, before = unchanged
    call(model)
    assert portrait(model) == before


# Precision and place


CASTS = {
    "half": lambda module: module.half(), "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(), "type": lambda module: module.type(torch.float16),
    "to": lambda module: module.to(torch.bfloat16), "to device": lambda module: module.to("cpu", torch.float16),
    "to tensor": lambda module: module.to(torch.zeros(1, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_that_would_reach_the_base_is_refused(cast, wrapped, unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match="Load the model again with `dtype=torch"):
        cast(nn.Sequential(model) if wrapped else model)
    assert portrait(model) == before


def test_move_to_where_weights_are_lost_is_refused(unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match="meta"):
        model.to("meta")
    assert portrait(model) == before


def test_cast_to_the_precision_of_the_base_reaches_tower_and_projector_alone():
    base = tiny_base("llama", dtype=torch.bfloat16)
    base.model.rotary_emb.float()  # as `from_pretrained` gives it
    model = tiny_genieblue(base=base)
    expected = model(prompt()).logits
    assert model.vision_tower.dtype == torch.float32
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.vision_tower.parameters()} == {torch.bfloat16}
    assert base.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.multimodal_language_model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(model(prompt()).logits, expected)
    model(REQUEST, pixel_values=PIXELS)


# Training state


def test_requires_grad_reaches_what_is_ours_alone(model):
    def trains():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model.requires_grad_(False)
    assert not trains()
    model.requires_grad_(True)
    assert {name.split(".")[0] for name in trains()} == {
        "vision_tower", "multi_modal_projector", "multimodal_language_model"
    }  # fmt: skip
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    model.train()
    model(REQUEST, pixel_values=PIXELS, labels=REQUEST).loss.backward()
    assert not [name for name in trains() if model.get_parameter(name).grad is None]


def test_apply_reaches_what_is_ours_alone(model):
    before = copy.deepcopy(model.language_model.state_dict())
    seen = []

    def spoil(module):
        seen.append(type(module).__name__)
        for parameter in module.parameters(recurse=False):
            torch.nn.init.zeros_(parameter)

    assert model.apply(spoil) is model
    after = model.language_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(value.any() for value in model.state_dict().values())
    assert seen[-1] == type(model).__name__


def test_tying_does_not_tie_what_the_base_does_not():
    """A base whose configuration says tied, and whose files hold two weights, as transformers loads it."""
    base = tiny_base("llama")
    base.config.tie_word_embeddings = True
    model = tiny_genieblue(base=base)
    expected = model(prompt()).logits
    model.tie_weights()
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    assert torch.equal(model(prompt()).logits, expected)


def test_module_of_the_base_is_not_replaced_and_one_of_ours_is(model):
    for name in ("language_model.lm_head", "multimodal_language_model.model.layers.0", "language_model"):
        with pytest.raises(ValueError, match="base_model="):
            model.set_submodule(name, nn.Identity())
    assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)
    other = nn.LayerNorm(32)
    model.set_submodule("vision_tower.post_layernorm", other)
    assert model.vision_tower.post_layernorm is other


# The multimodal view by itself


TREES = {"view": lambda model: model.multimodal_language_model,
         "decoder": lambda model: model.multimodal_language_model.model}  # fmt: skip
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@trees
@pytest.mark.parametrize("name", sorted(VIEW_REFUSALS))
def test_view_refuses_what_the_model_refuses(name, tree, unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match=f"`{name}` is refused for a GenieBlue: .{{30}}"):
        getattr(tree(model), name)()
    assert portrait(model) == before


@trees
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
@pytest.mark.parametrize("cast", [*CASTS.values(), lambda module: module.to("meta")], ids=[*CASTS, "meta"])
def test_view_is_neither_cast_nor_moved_without_the_base(cast, wrapped, tree, unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match="Move the whole GenieBlue"):
        cast(nn.Sequential(tree(model)) if wrapped else tree(model))
    assert portrait(model) == before


@trees
def test_view_trains_initialises_and_ties_its_adapter_alone(tree, model):
    part, base = tree(model), copy.deepcopy(model.language_model.state_dict())
    adapter = {id(parameter) for _, _, parameter in adapter_parameters(model.multimodal_language_model)}
    part.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in part.parameters())
    part.requires_grad_(True)
    assert {id(parameter) for parameter in part.parameters() if parameter.requires_grad} == adapter
    part.apply(lambda module: [nn.init.zeros_(each) for each in module.parameters(recurse=False)])
    assert not any(each.any() for _, _, each in adapter_parameters(model.multimodal_language_model))
    part.to("cpu", torch.float32).train().tie_weights()
    assert all(torch.equal(value, base[name]) for name, value in model.language_model.state_dict().items())


@torch.no_grad()
def test_lora_is_merged_into_weights_of_the_view_alone(model):
    texts, seen = model(prompt()).logits, model(REQUEST, pixel_values=PIXELS).logits
    before = {name: id(parameter) for name, parameter in model.language_model.named_parameters()}
    layers = [module for module in model.multimodal_language_model.modules() if isinstance(module, BaseTunerLayer)]
    for act in ("merge", "unmerge"):
        for layer in layers:
            getattr(layer, act)()
        assert torch.equal(model(prompt()).logits, texts)
        torch.testing.assert_close(model(REQUEST, pixel_values=PIXELS).logits, seen, atol=1e-4, rtol=1e-4)
    assert before == {name: id(parameter) for name, parameter in model.language_model.named_parameters()}


@torch.no_grad()
def test_copies_of_a_model_are_as_guarded_as_it(model):
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for copied in (copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        view = copied.multimodal_language_model
        assert type(view) is type(model.multimodal_language_model)
        assert view.generation_config is copied.language_model.generation_config is not model.generation_config
        with pytest.raises(ValueError, match="Move the whole GenieBlue"):
            view.half()
        expected = copied(prompt()).logits
        for layer in (module for module in view.modules() if isinstance(module, BaseTunerLayer)):
            layer.merge()
        assert torch.equal(copied(prompt()).logits, expected)


@pytest.mark.parametrize("family", ["llama", "bluelm"])
@torch.no_grad()
def test_loss_that_is_set_is_that_of_every_row(family):
    model = tiny_genieblue(family)
    own = model(prompt(), labels=prompt()).loss
    assert torch.equal(own, model.language_model(prompt(), labels=prompt()).loss)
    given = []
    for part in (model, model.language_model, model.multimodal_language_model):
        part.loss_function = lambda logits, labels, vocab_size, **_: given.append(len(labels)) or logits.sum()
        mixed = left_pad([prompt(), REQUEST])
        for inputs in ({"input_ids": prompt()}, {"input_ids": REQUEST, "pixel_values": PIXELS},
                       {**mixed, "pixel_values": PIXELS}):  # fmt: skip
            outputs = model(**inputs, labels=inputs["input_ids"])
            assert torch.equal(outputs.loss, outputs.logits.sum())
    assert given == [1, 1, 2] * 3


# What the base answers


def test_attention_is_set_as_it_would_be_on_the_base():
    base, model = tiny_base("llama"), tiny_genieblue()
    base.set_attn_implementation("eager")
    model.set_attn_implementation({"vision_config": "eager"})
    assert model.vision_tower.config._attn_implementation == "eager"
    assert model.language_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"text_config": "eager"})
    assert model.multimodal_language_model.config._attn_implementation == "eager"
    assert torch.equal(model(prompt()).logits, base(prompt()).logits)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)


@pytest.mark.parametrize(
    "choice",
    [
        "flash_attention_2",
        {"text_config": "flash_attention_2"},
        {"decoder": "eager"},
        {"text_config": "eager", "vision_config": "flash_attention_2"},
    ],
    ids=str,
)
def test_attention_that_cannot_run_changes_nothing(choice, unchanged):
    model, before = unchanged
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation(choice)
    assert portrait(model) == before


def test_transition_scores_are_those_of_the_base(model):
    options = {"max_new_tokens": 4, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    outputs = model.generate(prompt(), **options)
    for normalize in (False, True):
        scores = [part.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=normalize)
                  for part in (model, model.language_model)]  # fmt: skip
        assert torch.equal(*scores)


@torch.no_grad()
def test_what_reads_every_attribute_is_not_refused(unchanged):
    """`torch.jit.trace` does, and tools that inspect an object."""

    class Logits(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, ids, **pixels):
            return self.part(ids, use_cache=False, **pixels).logits

    model, _ = unchanged
    for part in (model, model.multimodal_language_model):
        assert dict(inspect.getmembers(part))["generation_config"] is model.generation_config
        traced = torch.jit.trace(Logits(part), (prompt(),))
        assert torch.equal(traced(prompt()), part(prompt()).logits)


@pytest.mark.parametrize("name", ["language_model", "multimodal_language_model"])
def test_view_is_not_replaced(name, unchanged):
    model, before = unchanged
    for other in (tiny_base("llama", seed=3), None):
        for replace in (setattr, nn.Module.add_module, nn.Module.register_module):
            with pytest.raises(ValueError, match="base_model=.* `compile\\(\\)`"):
                replace(model, name, other)
    assert portrait(model) == before
