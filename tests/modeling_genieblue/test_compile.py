"""`torch.compile`: each view is one graph, in `generate` too; the whole model stops only where it looks at the ids."""

import pytest
import torch
from tiny_genieblue import IMAGE, greedy, left_pad, prompt, row, tiles, tiny_genieblue
from tiny_models import tiny_base
from transformers import CompileConfig, StaticCache

TEXT, SEEN, PIXELS = row(5, 17, 30, 9, 77), row(5, IMAGE, 9, 40, 41), tiles()


def compiled_answers(view, step, inputs):
    """Logits of a prefill of `inputs` and of one step after it, over a static cache."""
    cache = StaticCache(config=view.config, max_cache_len=32)
    prefilled = step(**inputs, past_key_values=cache, use_cache=True).logits
    return prefilled, step(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@torch.no_grad()
def test_each_view_is_one_graph_in_prefill_and_decoding(family):
    model = tiny_genieblue(family)
    requests = {
        model.language_model: {"input_ids": prompt()},
        model.multimodal_language_model: {"inputs_embeds": model.embed_request(SEEN, PIXELS)},
    }
    for view, inputs in requests.items():
        torch._dynamo.reset()
        found = compiled_answers(view, torch.compile(view, backend="eager", fullgraph=True), inputs)
        torch.testing.assert_close(found, compiled_answers(view, view, inputs), atol=5e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_each_view_is_one_graph_for_the_default_compiler():
    model = tiny_genieblue()
    for view in (model.language_model, model.multimodal_language_model):
        found = compiled_answers(view, torch.compile(view, fullgraph=True), {"input_ids": prompt()})
        expected = compiled_answers(view, view, {"input_ids": prompt()})
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


class CountingBackend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs, **_options):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, _memo):
        return self


def compiling(backend) -> dict:
    config = CompileConfig(fullgraph=True, backend=backend)
    config._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("ids, pixels", [(TEXT, None), (SEEN, PIXELS)], ids=["text", "image"])
def test_generate_decodes_by_one_compiled_graph_in_the_view_that_runs(ids, pixels):
    torch._dynamo.reset()
    model, backend = tiny_genieblue(), CountingBackend()
    expected = greedy(model, ids, pixel_values=pixels)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, pixel_values=pixels, **compiling(backend)), expected)
    assert backend.graphs == 1


def test_a_base_that_was_compiled_before_does_not_answer_for_the_other_view():
    torch._dynamo.reset()
    base, backend = tiny_base("llama"), CountingBackend()
    greedy(base, TEXT, **compiling(backend))
    model = tiny_genieblue(base=base)
    expected = greedy(model, SEEN, pixel_values=PIXELS)
    assert torch.equal(greedy(model, SEEN, pixel_values=PIXELS, **compiling(backend)), expected)


def test_a_compiled_wrapper_is_no_base():
    with pytest.raises(TypeError, match="_orig_mod"):
        tiny_genieblue(base=torch.compile(tiny_base("llama"), backend="eager"))


@pytest.mark.parametrize(
    "request_, most",
    [
        ({"input_ids": TEXT}, 2),
        ({"input_ids": SEEN, "pixel_values": PIXELS, "num_tiles": torch.tensor([1])}, 5),
        ({**left_pad([TEXT, SEEN]), "pixel_values": PIXELS, "num_tiles": torch.tensor([1])}, 7),
    ],
    ids=["text", "image", "mixed"],
)
@torch.no_grad()
def test_whole_model_is_a_few_graphs_between_looks_at_the_ids_and_tiles(request_, most):
    torch._dynamo.reset()
    model, backend = tiny_genieblue(), CountingBackend()
    expected = model(**request_).logits  # also finds out how the base embeds ids
    torch.testing.assert_close(torch.compile(model, backend=backend)(**request_).logits, expected)
    assert backend.graphs <= most
