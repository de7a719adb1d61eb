"""Every setting of transformers' `generate`: with images it means what it says, or is refused by name."""

import copy
import inspect
import json

import pytest
import torch
from tiny_genieblue import IMAGE, IMAGE_ID, TOKENS_PER_TILE, left_pad, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import tiny_base, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, TextStreamer

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.configuration_genieblue import RUNTIME_SETTINGS

TEXT, SEEN, PIXELS = row(5, 17, 30, 9, 77), row(5, 60, IMAGE, 9, 40, 41), tiles()
GREEDY = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0}
SAMPLE = {"do_sample": True}

# With images: options that use the setting. What is drawn has one likely token only.
TESTED = {
    "max_length": {"max_length": 13, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 13, "eos_token_id": list(range(3, 100))},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(3, 100))},
    "early_stopping": {"num_beams": 2, "early_stopping": True, "eos_token_id": list(range(3, 60))},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": list("etaoinshr"), "tokenizer": tiny_tokenizer()},
    "do_sample": {**SAMPLE, "top_k": 1},
    "num_beams": {"num_beams": 3},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 64},
    "temperature": {**SAMPLE, "temperature": 1e-4},
    "top_k": {**SAMPLE, "top_k": 1},
    "top_p": {**SAMPLE, "top_p": 1e-4},
    "min_p": {**SAMPLE, "min_p": 1.0},
    "top_h": {**SAMPLE, "top_h": 1e-4},
    "typical_p": {**SAMPLE, "typical_p": 1e-4},
    "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 0.99},
    "eta_cutoff": {**SAMPLE, "temperature": 1e-4, "eta_cutoff": 0.9},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "length_penalty": {"num_beams": 3, "length_penalty": -3.0, "eos_token_id": list(range(3, 60))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(40, 100)]},
    "renormalize_logits": {"num_beams": 2, "renormalize_logits": True, "repetition_penalty": 3.0},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 5.0), "eos_token_id": 9},
    "suppress_tokens": {"suppress_tokens": list(range(40, 100))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(40, 100))},
    "sequence_bias": {"sequence_bias": [[[17], 50.0]]},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 1},
    "bos_token_id": {"bos_token_id": 1},
    "eos_token_id": {"eos_token_id": list(range(3, 100))},
}
REFUSED = {
    "use_mtp": True, "token_healing": True, "guidance_scale": 1.5, "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2, "is_assistant": True, "prompt_lookup_num_tokens": 2, "assistant_early_exit": 1,
    "speculation_type": "dflash", "penalty_alpha": 0.6, "dola_layers": "high", "num_beam_groups": 2,
    "constraints": [object()], "force_words_ids": [[5]], "prefill_chunk_size": 2,
}  # fmt: skip
PASSED_ON = {
    "output_attentions": "needs an attention implementation that returns them",
    "cache_config": "of a cache alone",
    "watermarking_config": "changes scores by what was generated",
    "decoder_start_token_id": "for encoders and decoders",
    "compile_config": "test_compile.py",
    "disable_compile": "test_compile.py",
    **dict.fromkeys(
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        "does nothing without an assistant, which is refused",
    ),
    "continuous_batching_config": "for a paged cache, which is refused",
    "low_memory": "for contrastive search, which is refused",
    "diversity_penalty": "for groups of beams, which are refused",
    "transformers_version": "a remark",
}  # fmt: skip
ARGUMENTS = {
    "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "streamer", "kwargs",
    "assistant_model", "custom_generate",  # refused
    "negative_prompt_ids", "negative_prompt_attention_mask",  # for `guidance_scale`, which is refused
}  # fmt: skip


def answer(model, ids, **options):
    """New tokens; images go along where `ids` has them."""
    pixels = {"pixel_values": PIXELS} if torch.equal(ids, SEEN) else {}
    generated = model.generate(ids, **pixels, **{**GREEDY, **options})
    return getattr(generated, "sequences", generated)[:, ids.shape[1] :].tolist()


class PaddedHead(nn.Module):
    """An LM head over more rows than it has, which are never likely."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden_states):
        return nn.functional.pad(self.head(hidden_states), (0, TOKENS_PER_TILE), value=-1e9)


def model_that_reads_the_image_as_words(model):
    """The multimodal view in which the image's features are rows of the embedding, and the request in its ids."""
    view = copy.deepcopy(model.multimodal_language_model)
    features = model.get_image_features(PIXELS).pooler_output.detach().flatten(0, 1)
    rows = torch.cat([view.get_input_embeddings().weight.detach(), features])
    view.model.embed_tokens = nn.Embedding.from_pretrained(rows)
    view.lm_head = PaddedHead(view.lm_head)
    ids = SEEN.clone()
    ids[ids == IMAGE_ID] = IMAGE_ID + torch.arange(TOKENS_PER_TILE)
    return view, ids


def test_every_setting_and_argument_of_generate_has_a_decision():
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert settings <= {*TESTED, *REFUSED, *PASSED_ON}
    assert set(inspect.signature(GenerationMixin.generate).parameters) - {"self"} <= ARGUMENTS


@pytest.fixture(scope="module")
def seeing():
    model = tiny_genieblue()
    return model, *model_that_reads_the_image_as_words(model)


@pytest.mark.parametrize("name", [name for name in TESTED if name in vars(GenerationConfig())])
def test_setting_means_with_an_image_what_it_means_for_words(name, seeing):
    model, reference, ids = seeing
    assert answer(model, SEEN, **TESTED[name]) == answer(reference, ids, **TESTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_works_from_ids_is_refused_with_images_wherever_it_is_set(name, monkeypatch):
    model = tiny_genieblue()
    monkeypatch.setattr(type(model), "embed_request", lambda *_: pytest.fail("something ran"))
    batch = left_pad([TEXT, SEEN])
    in_call = GenerationConfig()
    setattr(in_call, name, REFUSED[name])
    for options in ({name: REFUSED[name]}, {"generation_config": in_call}):
        for ids in (SEEN, batch["input_ids"]):
            with pytest.raises(ValueError, match=f"`{name}` works from the ids"):
                model.generate(ids, pixel_values=PIXELS, **options)
    setattr(model.generation_config, name, REFUSED[name])
    with pytest.raises(ValueError, match=f"`{name}` works from the ids"):
        model.generate(SEEN, pixel_values=PIXELS)


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_model": tiny_base("llama", seed=3)},
        {"custom_generate": lambda *_args, **_kwargs: None},
        {"inputs_embeds": torch.zeros(1, 5, 32), "view": "multimodal", "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_that_work_from_ids_are_refused_with_images(options):
    given = {} if "inputs_embeds" in options else {"inputs": SEEN, "pixel_values": PIXELS}
    with pytest.raises(ValueError, match="works from the ids"):
        tiny_genieblue().generate(**given, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": tiny_base("llama", seed=3)},
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"prefill_chunk_size": 2},
        {"custom_generate": lambda _model, input_ids, **_kwargs: input_ids + 1},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_text_takes_every_setting_as_the_base_does(options):
    base = tiny_base("llama")
    model = tiny_genieblue(base=base)
    torch.manual_seed(1)
    expected = answer(base, TEXT, **options)
    torch.manual_seed(1)
    assert answer(model, TEXT, **options) == expected


def test_settings_of_one_row_are_refused_for_a_mixed_batch():
    model, batch = tiny_genieblue(), left_pad([TEXT, SEEN])
    for name, value in {
        "return_dict_in_generate": True,
        "streamer": TextStreamer(tiny_tokenizer()),
        "prefix_allowed_tokens_fn": lambda _row, _ids: [5],
    }.items():
        with pytest.raises(ValueError, match=name):
            model.generate(**batch, pixel_values=PIXELS, **{**GREEDY, name: value})


def test_embeddings_beside_an_image_are_refused_and_where_the_images_are_is_no_setting():
    model = tiny_genieblue()
    with pytest.raises(ValueError, match="`inputs_embeds` are given beside ids with image tokens"):
        model.generate(SEEN, pixel_values=PIXELS, inputs_embeds=torch.zeros(*SEEN.shape, 32))
    types = (SEEN == IMAGE_ID).long()
    answers = [
        model.generate(SEEN, pixel_values=PIXELS, **GREEDY, **more) for more in ({}, {"mm_token_type_ids": types})
    ]
    assert torch.equal(*answers)


def test_a_paged_cache_is_refused_with_images():
    with pytest.raises(ValueError, match="takes no images"):
        tiny_genieblue().generate(SEEN, pixel_values=PIXELS, cache_implementation="paged")


# One truth


def test_both_views_have_the_bases_generation_configuration():
    base = tiny_base("llama")
    own = base.generation_config
    model = tiny_genieblue(base=base)
    assert model.generation_config is own is model.multimodal_language_model.generation_config
    new = model.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert base.generation_config is new is model.multimodal_language_model.generation_config
    new = model.multimodal_language_model.generation_config = GenerationConfig(max_new_tokens=4, pad_token_id=0)
    assert base.generation_config is new is model.generation_config
    base.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generation_config is base.generation_config
    for ids in (TEXT, SEEN):
        pixels = {} if ids is TEXT else {"pixel_values": PIXELS}
        assert model.generate(ids, **pixels).shape[1] == ids.shape[1] + 3


def test_a_setting_acts_on_texts_and_images_and_unset_means_unset():
    model = tiny_genieblue()
    first = {0: answer(model, TEXT)[0][0], 1: answer(model, SEEN)[0][0]}
    model.generation_config.eos_token_id = list(first.values())
    batch = left_pad([TEXT, SEEN])
    together = model.generate(**batch, pixel_values=PIXELS, **GREEDY)
    assert together[:, batch["input_ids"].shape[1] :].tolist() == [[first[0]], [first[1]]]
    model.generation_config.eos_token_id = None
    model.generation_config.max_new_tokens = 3
    assert model.generate(SEEN, pixel_values=PIXELS).shape[1] == SEEN.shape[1] + 3
    model.generation_config.max_new_tokens = None
    for ids, pixels in ((TEXT, None), (SEEN, PIXELS)):
        assert model.generate(ids, pixel_values=pixels).shape[1] == ids.shape[1] + 20  # transformers' default


def test_configuration_of_a_call_takes_what_it_leaves_unset_from_the_model():
    model = tiny_genieblue()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 3, answer(model, TEXT)[0][0]
    batch = left_pad([TEXT, SEEN])
    generated = model.generate(batch["input_ids"], GenerationConfig(max_new_tokens=4), pixel_values=PIXELS)
    assert generated[0, -3:].tolist() == [3, 3, 3]


def test_generation_settings_in_the_models_configuration_are_refused_as_transformers_does():
    model = tiny_genieblue()
    model.config.max_length = 30
    for ids, pixels in ((TEXT, None), (SEEN, PIXELS)):
        with pytest.raises(ValueError, match="max_length.*generation_config"):
            model.generate(ids, pixel_values=pixels)
    model.generate(TEXT, GenerationConfig(max_new_tokens=1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GenieBlue on disk that was saved with settings of its own, beside its base."""
    folder = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    return folder


def test_settings_in_force_are_saved_and_come_back_for_both_views(pair):
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    assert model.generation_config.max_new_tokens == model.language_model.generation_config.max_new_tokens == 3
    given = GenieBlueForConditionalGeneration.from_pretrained(pair, base_model=pair.parent / "base")
    assert given.generation_config.max_new_tokens == 3
    chosen = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    model = GenieBlueForConditionalGeneration.from_pretrained(pair, generation_config=chosen)
    for ids, pixels in ((TEXT, None), (SEEN, PIXELS)):
        assert model.generate(ids, pixel_values=pixels).shape[1] == ids.shape[1] + 2


def test_a_given_base_keeps_its_settings_and_gives_them_to_images(pair):
    base = AutoModelForCausalLM.from_pretrained(pair.parent / "base")
    base.generation_config.max_new_tokens = 4
    before, own = base.generation_config.to_dict(), base.generation_config
    model = GenieBlueForConditionalGeneration.from_pretrained(pair, base_model=base)
    assert base.generation_config is own and own.to_dict() == before
    assert torch.equal(model.generate(TEXT), base.generate(TEXT))
    assert model.generate(SEEN, pixel_values=PIXELS).shape[1] == SEEN.shape[1] + 4
    with pytest.raises(ValueError, match="`generation_config` is given with a loaded base"):
        GenieBlueForConditionalGeneration.from_pretrained(pair, base_model=base, generation_config=GenerationConfig())


PASSES = {"text": (TEXT, None), "image": (SEEN, PIXELS), "mixed": (left_pad([TEXT, SEEN])["input_ids"], PIXELS)}


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("where", ["model", "base"])
@torch.no_grad()
def test_configured_outputs_of_a_pass_are_those_of_both_views(where, kind):
    ids, pixels = PASSES[kind]
    base = tiny_base("llama")
    base.set_attn_implementation("eager")
    model = tiny_genieblue(base=base)
    plain = model(ids, pixel_values=pixels)
    assert plain.past_key_values is not None and plain.hidden_states is None and plain.attentions is None
    config = (model if where == "model" else base).config
    config.use_cache, config.output_hidden_states, config.output_attentions = False, True, True
    outputs = model(ids, pixel_values=pixels)
    assert outputs.past_key_values is None
    assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
    assert torch.equal(outputs.logits, plain.logits)
    given = model(ids, pixel_values=pixels, use_cache=True, output_hidden_states=False)
    assert given.past_key_values is not None and given.hidden_states is None
    if where == "model":
        config.return_dict = False
        assert isinstance(model(ids, pixel_values=pixels), tuple)
        assert base.config.output_hidden_states is False and base.config.use_cache is True


def test_unset_settings_are_not_written_and_set_ones_come_back(tmp_path):
    model = GenieBlueForConditionalGeneration.from_pretrained(save_tiny_pair(tmp_path))
    written = json.loads((tmp_path / "genieblue/config.json").read_text())
    assert [written.get(name) for name in RUNTIME_SETTINGS] == [None] * 4
    model.config.output_hidden_states, model.config.use_cache = True, False  # the latter as Trainer leaves it
    model.save_pretrained(tmp_path / "genieblue")
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "genieblue")
    assert loaded.config.output_hidden_states is True and "use_cache" not in vars(loaded.config)


def test_attention_of_the_whole_model_and_of_one_part():
    base = tiny_base("llama")
    base.set_attn_implementation("eager")
    model = tiny_genieblue(base=base)

    def found():
        parts = (model, model.language_model, model.multimodal_language_model, model.vision_tower)
        return [part.config._attn_implementation for part in parts]

    assert found() == ["eager", "eager", "eager", "sdpa"]
    model.config.output_attentions = True  # refused by transformers where the model's own says something else
    model.config.output_attentions = None
    model.set_attn_implementation({"vision_config": "eager"})
    assert found() == ["eager"] * 4
    assert model.config.vision_config._attn_implementation == "eager"
    model.set_attn_implementation({"text_config": "sdpa"})
    assert found() == ["sdpa", "sdpa", "sdpa", "eager"]
    model.multimodal_language_model.set_attn_implementation("eager")
    assert base.config._attn_implementation == "sdpa"  # the base is not touched by what is done to the other view
