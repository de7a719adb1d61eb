"""The tiny bases behave as real ones do: they load, generate, and do not care about padding."""

import pytest
import torch
from tiny_models import (
    FAMILIES,
    FAMILIES_WITH_BOS,
    PROMISED_FAMILIES,
    REMOTE_CODE_FAMILIES,
    VOCABULARY,
    save_tiny_base,
    tiny_base,
    tiny_tokenizer,
    tiny_vision_tower,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_genieblue.compat_genieblue import adapt_to_cache_of_generate

TEXT = "How many digits are there?\n  Four: 1, 2, 3, 4."
# Longer than the sliding windows, and free of the padding id.
PROMPT = torch.tensor([[17, 80, 33, 64, 25, 90, 110, 41, 77, 58, 12, 99]])


# A plain family, one with several kinds of attention, one with its own code.
@pytest.fixture(scope="module", params=("llama", "gemma3_text", "bluelm"))
def family_and_model(request, tmp_path_factory):
    folder = save_tiny_base(request.param, tmp_path_factory.mktemp("base"))
    trust = request.param in REMOTE_CODE_FAMILIES
    return request.param, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()


def test_promised_families_exist():
    assert set(PROMISED_FAMILIES) <= set(FAMILIES)


def test_loaded_base_equals_the_one_that_was_saved(family_and_model):
    family, model = family_and_model
    assert torch.equal(model(PROMPT).logits, tiny_base(family)(PROMPT).logits)


def test_generation_with_cache_equals_generation_without(family_and_model):
    _, model = family_and_model
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    cached = model.generate(PROMPT, use_cache=True, **settings)
    uncached = model.generate(PROMPT, use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    assert cached.shape == (1, PROMPT.shape[1] + 10)


def test_left_padded_rows_generate_as_they_do_alone(family_and_model):
    _, model = family_and_model
    short = PROMPT[:, :5]
    padding = torch.zeros(1, PROMPT.shape[1] - 5, dtype=torch.long)
    batch = torch.cat((PROMPT, torch.cat((padding, short), dim=1)))
    mask = torch.cat((torch.ones_like(PROMPT), torch.cat((padding, torch.ones_like(short)), dim=1)))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    together = model.generate(batch, attention_mask=mask, **settings)[:, PROMPT.shape[1] :]
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **settings) for row in (PROMPT, short)]

    assert torch.equal(together[0], alone[0][0, PROMPT.shape[1] :])
    assert torch.equal(together[1], alone[1][0, short.shape[1] :])


def test_every_block_moves_the_logits(family_and_model):
    family, model = family_and_model
    whole = model(PROMPT, use_cache=False).logits
    other = tiny_base(family, seed=1)
    for index in range(model.config.num_hidden_layers):
        changed = tiny_base(family)
        changed.model.layers[index].load_state_dict(other.model.layers[index].state_dict())
        assert (changed(PROMPT, use_cache=False).logits - whole).abs().max() > 1e-2


def test_loss_reaches_every_parameter(family_and_model):
    family, _ = family_and_model
    model = tiny_base(family)
    model(PROMPT, labels=PROMPT).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_number_of_blocks_can_be_chosen(family_and_model):
    family, _ = family_and_model
    model = tiny_base(family, num_hidden_layers=6)
    assert len(model.model.layers) == 6
    assert model(PROMPT).logits.shape == (1, PROMPT.shape[1], VOCABULARY)


@pytest.mark.parametrize("family", REMOTE_CODE_FAMILIES)
def test_remote_code_base_is_refused_without_permission(family, tmp_path):
    folder = save_tiny_base(family, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_bluelm_variants_differ_only_in_who_normalizes_given_embeddings():
    inside, outside = tiny_base("bluelm"), tiny_base("bluelm-outside")
    assert torch.equal(inside(PROMPT).logits, outside(PROMPT).logits)

    embeddings = inside.model.embed_tokens(PROMPT)
    normalized = inside.model.embed_layer_norm(embeddings)
    assert torch.equal(inside(inputs_embeds=normalized).logits, inside(PROMPT).logits)
    assert not torch.allclose(inside(inputs_embeds=embeddings).logits, inside(PROMPT).logits, atol=1e-2)
    assert torch.equal(outside(inputs_embeds=embeddings).logits, outside(PROMPT).logits)


@pytest.mark.parametrize("family", REMOTE_CODE_FAMILIES)
def test_bluelm_generates_from_embeddings_as_from_ids(family):
    """By itself only before transformers 5.24, which renamed the cache that its code looks for."""
    model = tiny_base(family)
    adapt_to_cache_of_generate(model)
    embeddings = model.model.embed_tokens(PROMPT)
    if family == "bluelm":
        embeddings = model.model.embed_layer_norm(embeddings)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    from_ids = model.generate(PROMPT, **settings)[:, PROMPT.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), from_ids)


def test_equal_arguments_give_equal_weights_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second = tiny_base("llama").state_dict(), tiny_base("llama").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["qwen2", *FAMILIES_WITH_BOS[:1], "bluelm"])
def test_saved_tokenizer_comes_back_the_same(family, tmp_path):
    saved = tiny_tokenizer(add_bos=family in FAMILIES_WITH_BOS)
    trust = family in REMOTE_CODE_FAMILIES
    loaded = AutoTokenizer.from_pretrained(save_tiny_base(family, tmp_path), trust_remote_code=trust)
    conversation = [{"role": "user", "content": TEXT}]
    assert loaded(TEXT)["input_ids"] == saved(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert loaded.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) == (
        ("<s>" if family in FAMILIES_WITH_BOS else "") + f"<|user|>\n{TEXT}</s>\n<|assistant|>\n"
    )


def test_tokenizer_without_chat_template_has_none():
    assert tiny_tokenizer(chat_template=False).chat_template is None


def test_tokenizer_ids_fit_the_embedding():
    assert len(tiny_tokenizer()) < VOCABULARY


def test_vision_tower_has_an_odd_grid_of_patches():
    features = tiny_vision_tower()(pixel_values=torch.rand(2, 3, 24, 24)).last_hidden_state
    assert features.shape == (2, 3 * 3, 32)


def test_vision_tower_can_go_without_its_pooling_head():
    tower = tiny_vision_tower(vision_use_head=False)
    assert not [name for name, _ in tower.named_parameters() if "head" in name]
