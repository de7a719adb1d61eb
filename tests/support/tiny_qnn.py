"""Tiny models in the shapes that QNN graphs are tested with: chunks of 8 tokens in a context of 64."""

from pathlib import Path

import numpy as np
import torch
from tiny_genieblue import IMAGE, prompt, row, tiles, tiny_genieblue
from tiny_models import save_tiny_base, tiny_base
from transformers import AutoModelForCausalLM

from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import make_decoder_shape

CHUNK, CONTEXT = 8, 64
# A random model of 64 channels has little left in 4 bits.
SETTINGS = {"soc": "sm8750", "chunk_length": CHUNK, "context_length": CONTEXT, "llm": "w8a16"}
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Each a family, or a variant of one that other code paths serve.
VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-biased": ("llama-biased", {}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama-scaled-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "bluelm": ("bluelm", {}),
}


def tiny_model(variant: str = "llama", dtype: torch.dtype = torch.float32, **options):
    """A GenieBlue with a trained-looking adapter on a tiny base of `variant`."""
    family, overrides = VARIANTS[variant]
    return tiny_genieblue(base=tiny_base(family, dtype=dtype, **{**SHAPE, **overrides}), **options).to(dtype)


def two_blocks(variant: str = "llama", dtype: torch.dtype = torch.float32):
    """The same with two blocks, the second one replicated: everything there is, exported in half the time."""
    family, overrides = VARIANTS[variant]
    base = tiny_base(family, dtype=dtype, **{**SHAPE, **overrides}, num_hidden_layers=2)
    return tiny_genieblue(base=base, replicated_layers=[1]).to(dtype)


def view_of(model, name: str):
    """The `text` or `multimodal` view."""
    return model.language_model if name == "text" else model.multimodal_language_model


def torch_runner(graph: DecoderGraph):
    """Runs `graph` itself, as `ChunkedDecoder` calls it."""

    @torch.no_grad()
    def run(_tokens: int, feeds) -> dict[str, np.ndarray]:
        outputs = graph(*(torch.from_numpy(feeds[name]) for name in graph.input_names))
        return {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}

    return run


def decoder_for(model, view: str, make_run) -> ChunkedDecoder:
    """A `ChunkedDecoder` over the whole `view`, run by `make_run(graph)`."""
    shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
    return ChunkedDecoder(shape, make_run(DecoderGraph(view_of(model, view), shape)), CHUNK, CONTEXT)


@torch.no_grad()
def embeddings_and_logits(model, view: str, length: int, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (length, hidden) of random tokens, and what the PyTorch view says to them, (length, vocabulary)."""
    ids = torch.randint(7, 120, (1, length), generator=torch.Generator().manual_seed(seed))
    embeddings = model.language_model.get_input_embeddings()(ids)
    logits = view_of(model, view)(inputs_embeds=embeddings, use_cache=False).logits
    return embeddings[0].numpy(), logits[0].numpy()


def save_pair(folder: Path, variant: str = "llama") -> Path:
    """Saves a base of two blocks as `folder/base` and a trained GenieBlue on it as `folder/genieblue`."""
    family, overrides = VARIANTS[variant]
    save_tiny_base(family, folder / "base", **{**SHAPE, **overrides}, num_hidden_layers=2)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tiny_genieblue(base=base, replicated_layers=[1]).save_pretrained(folder / "genieblue")
    return folder / "genieblue"


def requests(count=3):
    """Encoded requests, each once as a text and once with an image."""
    found = []
    for seed in range(count):
        words = prompt(24, seed=seed)[0].tolist()
        found.append({"input_ids": words})
        found.append({"input_ids": row(words[:5], IMAGE, words[5:])[0], "pixel_values": tiles(1, seed=seed)})
    return found
