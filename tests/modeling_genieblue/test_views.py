"""Two views over one set of weights: the text view is the base, bit for bit and object for object."""

import hashlib

import pytest
import torch
from tiny_genieblue import (
    IMAGE,
    IMAGE_ID,
    change_adapter,
    left_pad,
    prompt,
    row,
    save_tiny_pair,
    tiles,
    tiny_genieblue,
)
from tiny_models import FAMILIES, PROMISED_FAMILIES, tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

every_family = pytest.mark.parametrize("family", FAMILIES)
promised_family = pytest.mark.parametrize("family", PROMISED_FAMILIES)
# Llama has the layout of most, Gemma-3 two kinds of attention, BlueLM its own code.
telling_family = pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3_text", "bluelm"])
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
LABELS = REQUEST.masked_fill(REQUEST == IMAGE_ID, -100)


def tensor_hashes(model):
    return {name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in model.state_dict().items()}  # fmt: skip


def portrait(model):
    """Everything of a base that must not change."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "attention": model.config._attn_implementation,
        "generation_config": model.generation_config.to_dict(),
        "hashes": tensor_hashes(model),
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        "own_attributes": sorted(vars(model)),
        "logits": model(prompt(12, batch=2)).logits.tolist(),
    }


def generate(model, ids, *, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs.setdefault("max_new_tokens", 9)
    kwargs.setdefault("pad_token_id", 0)
    return model.generate(ids, **kwargs)


# The text view is the base


@promised_family
@torch.no_grad()
def test_text_logits_are_those_of_the_plain_base(family):
    base, model = tiny_base(family), tiny_genieblue(family)
    ids = prompt(12, batch=2)
    assert torch.equal(model(ids).logits, base(ids).logits)
    padded = left_pad([prompt(12), prompt(5, seed=4)])
    assert torch.equal(model(**padded).logits, base(**padded).logits)
    assert not torch.equal(model(ids, view="multimodal").logits, base(ids).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"do_sample": False}) for family in PROMISED_FAMILIES),
        *((family, SAMPLING) for family in ("llama", "bluelm")),
        ("llama", {"do_sample": False, "use_cache": False}),
        *((family, {"num_beams": 3}) for family in ("llama", "gemma3_text", "bluelm")),
    ],
    ids=str,
)
def test_text_is_generated_as_by_the_plain_base(family, options):
    base, model = tiny_base(family), tiny_genieblue(family)
    padded = left_pad([prompt(12), prompt(5, seed=4)])
    mask = padded["attention_mask"]
    expected = generate(base, padded["input_ids"], attention_mask=mask, **options)
    assert torch.equal(generate(model, padded["input_ids"], attention_mask=mask, **options), expected)


@telling_family
def test_generated_scores_and_hidden_states_are_those_of_the_plain_base(family):
    base, model = tiny_base(family), tiny_genieblue(family)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, **SAMPLING}
    ours, plain = generate(model, prompt(), **options), generate(base, prompt(), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(ours.scores, plain.scores, strict=True))
    if plain.hidden_states[-1] is not None:
        assert torch.equal(ours.hidden_states[-1][-1], plain.hidden_states[-1][-1])


@telling_family
def test_text_loss_and_hidden_states_are_those_of_the_plain_base(family):
    base, model = tiny_base(family), tiny_genieblue(family)
    ids = prompt(12, batch=2)
    labels = ids.masked_fill(ids < 30, -100)
    ours = model(ids, labels=labels, output_hidden_states=True)
    plain = base(ids, labels=labels, output_hidden_states=True)
    assert torch.equal(ours.loss, plain.loss)
    assert all(torch.equal(one, other) for one, other in zip(ours.hidden_states, plain.hidden_states, strict=True))


def test_text_embeddings_are_answered_by_the_base():
    base, model = tiny_base("llama"), tiny_genieblue("llama")
    embeddings = base.get_input_embeddings()(prompt())
    assert torch.equal(model(inputs_embeds=embeddings).logits, base(inputs_embeds=embeddings).logits)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    expected = base.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected)


# The base stays what it was


@promised_family
def test_base_is_untouched_by_a_new_genieblue_its_requests_and_a_training_step(family):
    base = tiny_base(family)
    before = portrait(base)
    model = tiny_genieblue(family, base=base, trained=False)
    assert model.language_model is base
    assert portrait(base) == before

    model(REQUEST, pixel_values=PIXELS)
    generate(model, REQUEST, pixel_values=PIXELS)
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(REQUEST, pixel_values=PIXELS, labels=LABELS).loss.backward()
    optimizer.step()
    model.eval()
    assert portrait(base) == before
    assert not torch.equal(model(REQUEST[:, 5:], view="multimodal").logits, base(REQUEST[:, 5:]).logits)


@telling_family
def test_base_is_untouched_by_loading_onto_it_and_by_saving(family, tmp_path):
    folder = save_tiny_pair(tmp_path, family)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir() if path.is_file()}
    before = portrait(base)
    model = GenieBlueForConditionalGeneration.from_pretrained(folder, base_model=base)
    assert model.language_model is base
    model.save_pretrained(tmp_path / "again")
    assert portrait(base) == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir() if path.is_file()} == files


def test_frozen_base_and_trainable_rest():
    model = tiny_genieblue(trained=False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trainable if name.startswith("language_model.")]
    language = {f"multimodal_language_model.{name}" for name, _, _ in
                adapter_parameters(model.multimodal_language_model)}  # fmt: skip
    assert {name for name in trainable if name.startswith("multimodal_language_model.")} == language
    assert any(name.startswith("vision_tower.") for name in trainable)
    assert any(name.startswith("multi_modal_projector.") for name in trainable)


def test_gradients_reach_everything_that_trains_and_nothing_else():
    model = tiny_genieblue().train()
    model(REQUEST, pixel_values=PIXELS, labels=LABELS).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    without = [name for name in without if model.get_parameter(name).grad is None]
    assert all("head" in name for name in without), without  # SigLIP's pooling head is not used
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


# One set of weights


@every_family
@torch.no_grad()
def test_views_agree_at_the_start_and_part_with_training(family):
    model = tiny_genieblue(family, trained=False)
    padded = left_pad([prompt(12), prompt(5, seed=4)])
    text = model(**padded).logits
    valid = padded["attention_mask"].bool()
    torch.testing.assert_close(model(**padded, view="multimodal").logits[valid], text[valid], atol=1e-6, rtol=0)
    change_adapter(model)
    assert (model(**padded, view="multimodal").logits - text)[valid].abs().max() > 1e-2
    assert torch.equal(model(**padded).logits, tiny_base(family)(**padded).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_views_agree_at_the_start_in_half_precision(dtype):
    base = tiny_base("llama", dtype=dtype)
    model = tiny_genieblue(base=base, trained=False)
    copies = [p for name, _, p in adapter_parameters(model.multimodal_language_model) if ".lora_" not in name]
    assert {copied.dtype for copied in copies} == {dtype}
    assert torch.equal(model(prompt(12), view="multimodal").logits, model(prompt(12)).logits)
    assert torch.equal(model(prompt(12)).logits, tiny_base("llama", dtype=dtype)(prompt(12)).logits)


@telling_family
def test_frozen_weights_of_the_multimodal_view_are_the_bases_own(family):
    model = tiny_genieblue(family)
    of_base = {id(parameter) for parameter in model.language_model.parameters()}
    of_adapter = {id(parameter) for _, _, parameter in adapter_parameters(model.multimodal_language_model)}
    of_view = {id(parameter) for parameter in model.multimodal_language_model.parameters()}
    assert not of_base & of_adapter
    assert of_view == of_base | of_adapter


def test_memory_holds_the_base_once():
    base = tiny_base("llama", hidden_size=64, intermediate_size=256)
    of_base = sum(parameter.nbytes for parameter in base.parameters())
    model = tiny_genieblue(base=base)
    model(REQUEST, pixel_values=PIXELS)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for module in (model.language_model, model.multimodal_language_model)
                for t in (*module.parameters(), *module.buffers())}  # fmt: skip
    of_adapter = sum(p.nbytes for _, _, p in adapter_parameters(model.multimodal_language_model))
    assert sum(storages.values()) <= of_base + of_adapter + 4096  # and a few small buffers
    assert model.get_memory_footprint() < of_base + of_adapter + 300_000  # vision tower and projector


@pytest.mark.parametrize("placement, expected", [("skip", [3, 7, 11]), ("pre", [0, 1, 2]), ("post", [9, 10, 11])])
@torch.no_grad()
def test_placement_says_which_blocks_are_copies(placement, expected):
    base = tiny_base("llama", num_hidden_layers=12)
    model = tiny_genieblue(base=base, placement=placement)
    names = [stock for _, stock, _ in adapter_parameters(model.multimodal_language_model)]
    copied = {int(name.split("layers.")[1].split(".")[0]) for name in names if ".lora_" not in name}
    adapted = {int(name.split("layers.")[1].split(".")[0]) for name in names if ".lora_" in name}
    assert model.config.replicated_layers == expected
    assert sorted(copied) == expected
    assert adapted == set(range(12)) - copied
    assert torch.equal(model(prompt()).logits, tiny_base("llama", num_hidden_layers=12)(prompt()).logits)


def test_blocks_to_copy_can_be_named():
    base = tiny_base("llama", num_hidden_layers=14)
    model = tiny_genieblue(base=base, replicated_layers=[12, 1])
    assert model.config.replicated_layers == [1, 12]
    assert model.config.placement is None
    names = [stock for _, stock, _ in adapter_parameters(model.multimodal_language_model)]
    # Blocks 2, 11 and 13, whose numbers end or begin alike, are not taken for them.
    assert {name.split("layers.")[1].split(".")[0] for name in names if ".lora_" not in name} == {"1", "12"}
    # With norms: a copied block has 9 tensors.
    assert sum(".lora_" not in name for name in names) == 18


@pytest.mark.parametrize("layers, message", [([0, 0], "twice"), ([4], "0 to 3"), ([-1], "0 to 3"),
                                             ([], "at least one"), ([0, 1, 2, 3], "at least one")])  # fmt: skip
def test_impossible_blocks_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        tiny_genieblue(replicated_layers=layers)


@pytest.mark.parametrize("options, message", [({"placement": "middle"}, "skip, pre"), ({"lora_rank": 0}, "rank")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_genieblue(**options)


def test_base_with_an_adapter_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(str(folder / "language_adapter"))
    with pytest.raises(ValueError, match="merge"):
        GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower())


def test_whole_siglip_gives_its_vision_model():
    """`AutoModel.from_pretrained("google/siglip-...")` returns both encoders."""
    from transformers import SiglipConfig, SiglipModel

    vision = tiny_vision_tower()
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "projection_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    siglip = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text)).eval()
    model = GenieBlueForConditionalGeneration.from_base(tiny_base("llama"), siglip, lora_rank=4)
    features = siglip.vision_model(PIXELS).last_hidden_state
    assert torch.equal(model.get_image_features(PIXELS).pooler_output, model.multi_modal_projector(features))
