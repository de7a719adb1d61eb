"""The rotation of hidden states: orthogonal, the same everywhere, and without effect on what a view says."""

import numpy as np
import pytest
import torch
from tiny_qnn import CHUNK, CONTEXT, embeddings_and_logits, tiny_model, torch_runner, view_of

from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import make_decoder_shape
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.graphs.vision_graph import VisionGraph


@pytest.mark.parametrize("size", [7, 48, 64, 576, 960])
def test_a_rotation_keeps_lengths_and_angles(size):
    found = Rotation(size).states(torch.eye(size))
    torch.testing.assert_close(found @ found.t(), torch.eye(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 576])
def test_a_huge_channel_is_spread_over_all(size):
    x = torch.zeros(size)
    x[3] = 22574.0
    assert Rotation(size).states(x).abs().max() <= 22574.0 * (2 / size) ** 0.5 + 1e-2
    assert Rotation(size).states(torch.ones(size)).abs().max() < 0.5 * size**0.5  # nor is a constant collected in one


def test_a_rotation_never_changes():
    """Bundles keep rotated embeddings, and adapters that are exported later must fit them."""
    found = Rotation(12).states(torch.arange(12.0))
    np.testing.assert_allclose(found[:4], [1.73205, -2.88675, 9.23760, -3.46410], atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "view"), [("llama", "text"), ("llama-biased", "multimodal"), ("qwen3", "multimodal")]
)
def test_rotated_graphs_give_the_logits_of_the_model(variant, view):
    model = tiny_model(variant)
    shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
    rotation = Rotation(shape.hidden_size)
    embeddings, logits = embeddings_and_logits(model, view, 2 * CHUNK + 3)
    graph = DecoderGraph(view_of(model, view), shape, rotation=rotation)
    decoder = ChunkedDecoder(shape, torch_runner(graph), CHUNK, CONTEXT)
    found = decoder.read(rotation.states(torch.from_numpy(embeddings)).numpy())
    np.testing.assert_allclose(found, logits, atol=2e-4)


@torch.no_grad()
def test_rotated_image_features_are_the_model_s():
    model = tiny_model("llama")
    rotation = Rotation(model.language_model.config.hidden_size)
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    expected = rotation.states(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(VisionGraph(model, rotation)(pixels), expected, atol=1e-4, rtol=1e-4)
