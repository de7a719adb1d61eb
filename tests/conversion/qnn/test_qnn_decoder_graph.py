"""The rewritten decoder graphs say what the PyTorch model says, in torch and as float ONNX."""

import numpy as np
import pytest
import torch
from tiny_genieblue import tiny_genieblue
from tiny_models import tiny_base
from tiny_qnn import (
    CHUNK,
    CONTEXT,
    SHAPE,
    VARIANTS,
    decoder_for,
    embeddings_and_logits,
    tiny_model,
    torch_runner,
)

from conversion.qnn.graphs.chunked_decoder import causal_mask
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import compare_with_graphs, make_decoder_shape
from conversion.qnn.graphs.float_onnx import structure, to_float_onnx

TOLERANCE = 1e-4
VIEWS = ("text", "multimodal")


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda variant: made.setdefault(variant, tiny_model(variant))


@pytest.mark.parametrize(
    ("variant", "view"), [*((variant, "multimodal") for variant in VARIANTS), ("llama", "text"), ("qwen3", "text")]
)
def test_chunks_and_then_tokens_give_the_logits_of_the_model(models, variant, view):
    model = models(variant)
    embeddings, logits = embeddings_and_logits(model, view, 3 * CHUNK + 3 + 6)
    decoder = decoder_for(model, view, torch_runner)
    prompt = 3 * CHUNK + 3
    found = [decoder.read(embeddings[:prompt])]
    found += [decoder.read(embeddings[place : place + 1]) for place in range(prompt, len(embeddings))]
    np.testing.assert_allclose(np.concatenate(found), logits, atol=TOLERANCE)


def test_the_two_views_of_a_trained_model_differ(models):
    text, multimodal = (embeddings_and_logits(models("llama"), view, 9)[1] for view in VIEWS)
    assert np.abs(text - multimodal).max() > 0.1


def test_a_context_can_be_filled_to_its_last_token(models):
    embeddings, logits = embeddings_and_logits(models("llama"), "text", CONTEXT)
    decoder = decoder_for(models("llama"), "text", torch_runner)
    # The chunk that would begin past the last full one has no room for its padding.
    found = np.concatenate([decoder.read(embeddings[:5]), decoder.read(embeddings[5:])])
    np.testing.assert_allclose(found, logits, atol=TOLERANCE)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens.*context of {CONTEXT}"):
        decoder.read(embeddings[:1])


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_read(models):
    decoder = decoder_for(models("llama"), "text", torch_runner)
    with pytest.raises(ValueError, match="shorten it"):
        decoder.read(np.zeros((CONTEXT + 1, 64), np.float32))
    assert decoder.length == 0


def test_parts_chained_are_the_whole(models):
    model = models("qwen3")
    shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
    view = model.multimodal_language_model
    parts = [DecoderGraph(view, shape, 0, 1), DecoderGraph(view, shape, 1, 3), DecoderGraph(view, shape, 3, 4)]

    def chained(_graph):
        def run(tokens, feeds):
            outputs, hidden = {}, feeds["inputs_embeds"]
            for part in parts:
                new = torch_runner(part)(tokens, {**feeds, part.input_names[0]: hidden})
                hidden = new.pop(part.output_names[0])
                outputs.update(new)
            return {**outputs, "logits": hidden}

        return run

    embeddings, logits = embeddings_and_logits(model, "multimodal", 2 * CHUNK + 1)
    np.testing.assert_allclose(decoder_for(model, "multimodal", chained).read(embeddings), logits, atol=TOLERANCE)


def test_a_mask_shows_each_token_the_cache_and_the_past():
    mask = causal_mask(tokens=2, cached=3, context_length=6)[0, 0]
    assert (mask == 0).tolist() == [[False, True, True, True, True, False], [False, True, True, True, True, True]]


def test_weights_of_the_text_graph_are_the_base_s(models):
    model = models("llama")
    graph = DecoderGraph(model.language_model, make_decoder_shape(model.language_model, CHUNK, CONTEXT))
    expected = model.language_model.model.layers[3].mlp.up_proj.weight.t()
    assert torch.equal(graph.blocks[3].up_proj.weight, expected)
    assert not [name for name, _ in graph.named_buffers() if "lora" in name]


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("phi3", "attention have qkv_proj"),
        ("gemma3_text", "pre_feedforward_layernorm"),
        ("olmo2", "post_feedforward_layernorm"),
        ("stablelm", "(?i)partial|stablelm"),
        ("granite", "changes the embeddings before"),
        ("smollm3", r"block \d \(SmolLM3DecoderLayer\) differs from a Llama-style block"),
        ("cohere", "lack post_attention_layernorm"),
        ("starcoder2", "MLP have act, c_fc, c_proj"),
        ("bluelm-outside", "changes the embeddings before"),
        ("mistral-sliding", "sliding window of 6 tokens is shorter than the context of 64"),
    ],
)
def test_a_base_of_another_kind_is_refused_with_what_is_unsupported(family, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_decoder_shape(tiny_base(family), CHUNK, CONTEXT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        # What a base does on the quiet, in blocks that look like Llama's.
        (lambda base: base.model.layers[2].register_forward_hook(lambda _m, _i, out: out * 1.01), "its block 2 "),
        (lambda base: base.lm_head.register_forward_hook(lambda _m, _i, out: out / 1.01), "after its blocks"),
        (lambda base: setattr(base.model.layers[1].self_attn, "scaling", 0.5), "its block 1 "),
    ],
)
def test_a_base_that_only_looks_like_llama_is_refused(changes, sentence):
    base = tiny_base("llama")
    changes(base)
    with pytest.raises(ValueError, match=sentence):
        make_decoder_shape(base, CHUNK, CONTEXT)


def test_scores_far_below_zero_do_not_lose_to_empty_slots_of_the_cache():
    base = tiny_base("qwen2", **SHAPE)
    with torch.no_grad():  # opposite biases of queries and keys, as trained Qwen2 models have large ones
        for layer in base.model.layers:
            layer.self_attn.q_proj.bias.zero_()[3::16] += 40.0
            layer.self_attn.k_proj.bias.zero_()[3::16] -= 40.0
    model = tiny_genieblue(base=base)
    shape = make_decoder_shape(base, CHUNK, CONTEXT)
    assert shape.masked < -400
    embeddings, logits = embeddings_and_logits(model, "text", 3 * CHUNK + 3)
    found = decoder_for(model, "text", torch_runner).read(embeddings)
    np.testing.assert_allclose(found, logits, atol=TOLERANCE)


def test_a_base_that_treats_late_tokens_otherwise_is_refused():
    base = tiny_base("llama")

    def later(_module, arguments, options, output):
        late = options["position_ids"] >= CONTEXT // 2
        return torch.where(late[..., None], output * 1.01, output)

    base.model.layers[1].register_forward_hook(later, with_kwargs=True)
    make_decoder_shape(base, CHUNK, CONTEXT // 2)
    with pytest.raises(ValueError, match=f"from position {CONTEXT - 24} its block 1"):
        make_decoder_shape(base, CHUNK, CONTEXT)


def test_the_comparison_leaves_nothing_on_the_base():
    base = tiny_base("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    make_decoder_shape(base, CHUNK, CONTEXT)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_window_as_long_as_the_context_is_no_window():
    make_decoder_shape(tiny_base("mistral-sliding", **SHAPE, sliding_window=CONTEXT), CHUNK, CONTEXT)


def test_experts_by_token_are_refused():
    base = tiny_base("llama")
    base.model.layers[1].mlp.vision_expert = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="mixture of experts.*cannot route tokens"):
        make_decoder_shape(base, CHUNK, CONTEXT)


@pytest.mark.parametrize(
    ("chunk", "context", "sentence"),
    [(8, 8, "longer than a chunk"), (8, 4, "longer than a chunk"), (1, 8, "2 tokens or more"), (8, 2048, "at most")],
)
def test_lengths_that_cannot_be_are_refused(chunk, context, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_decoder_shape(tiny_base("llama"), chunk, context)


# Lengths and numbers of heads that coincide with each other, or are one.
@pytest.mark.parametrize(("heads", "groups", "chunk"), [(4, 1, 8), (8, 1, 16), (4, 2, 2), (4, 4, 4), (4, 2, 16)])
def test_both_lengths_give_graphs_of_one_structure(heads, groups, chunk):
    changes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 16}
    base = tiny_base("llama", **{**SHAPE, **changes, "num_hidden_layers": 1})
    graph = DecoderGraph(base, make_decoder_shape(base, chunk, CONTEXT))
    found = [
        structure(to_float_onnx(graph, graph.example_inputs(tokens, CONTEXT), graph.input_names, graph.output_names))
        for tokens in (chunk, 1)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 3])  # with LoRA, and a trained copy
def test_a_multimodal_view_that_computes_something_else_is_refused(dtype, index):
    model = tiny_model(dtype=dtype)
    shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
    view = model.multimodal_language_model
    compare_with_graphs(view, shape, CONTEXT)
    up_proj = next(
        module for name, module in view.model.layers[index].named_modules()
        if name.endswith("up_proj") and "original_module" not in name
    )  # fmt: skip
    up_proj.register_forward_hook(lambda _module, _inputs, output: output * 1.05)  # as a LoRA of another kind would
    with pytest.raises(ValueError, match=f"The multimodal view cannot be.*its block {index} "):
        compare_with_graphs(view, shape, CONTEXT, "The multimodal view")


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_base_in_16_bits_is_taken_as_it_is(variant):
    make_decoder_shape(tiny_base(variant).to(torch.bfloat16), CHUNK, CONTEXT)
