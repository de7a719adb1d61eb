"""Tiny GenieBlue models, trained-looking ones too, and requests for them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import SEED, VOCABULARY, save_tiny_base, tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    file_sha256,
    own_weight_places,
    read_settings,
    write_json,
)

IMAGE_ID = VOCABULARY  # the first id that a tiny base does not have
TOKENS_PER_TILE = 4  # 3x3 patches, padded to 4x4, 2x2 of them per token
IMAGE = "image"


def tiny_genieblue(family: str = "llama", *, base: PreTrainedModel | None = None, trained: bool = True, **options):
    """A tiny GenieBlue on a tiny base of `family`, equal for equal arguments; `trained` changes the adapter."""
    if base is None:
        base = tiny_base(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # projector and LoRA A start at random
        model = GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower(), **{"lora_rank": 4, **options})
    return change_adapter(model) if trained else model


@torch.no_grad()
def change_adapter(model: GenieBlueForConditionalGeneration, seed: int = 7, scale: float = 0.1):
    """Adds noise to every parameter of the adapter, as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, parameter in adapter_parameters(model.multimodal_language_model):
        parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return model


def save_tiny_pair(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Saves a base as `folder/base` and a trained GenieBlue on it as `folder/genieblue`; returns the latter."""
    save_tiny_base(family, folder / "base", dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=True)
    model = tiny_genieblue(base=base, **options)
    model.to(dtype).save_pretrained(folder / "genieblue")
    return folder / "genieblue"


def train_a_little(folder: Path) -> None:
    """Adds a little to LoRA B on disk, which is zero in a model that was never trained and may not be published."""
    path = folder / "language_adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value + 1e-3 * (".lora_B." in name) for name, value in tensors.items()}, path, {"format": "pt"})
    config = read_settings(folder / CONFIG_NAME)
    fingerprint = {place: file_sha256(folder / place) for place in own_weight_places(folder)}
    write_json(folder / CONFIG_NAME, config | {"weight_fingerprint": fingerprint})


def prompt(length: int = 8, batch: int = 1, seed: int = 3) -> torch.Tensor:
    """Random ids of words, (batch, length)."""
    return torch.randint(7, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def row(*pieces: str | int | Sequence[int]) -> torch.Tensor:
    """One row of ids, (1, length): ids as they are, and the tokens of one tile for each `IMAGE`."""
    ids: list[int] = []
    for piece in pieces:
        ids += [IMAGE_ID] * TOKENS_PER_TILE if piece == IMAGE else [piece] if isinstance(piece, int) else list(piece)
    return torch.tensor([ids])


def tiles(count: int = 1, seed: int = 5) -> torch.Tensor:
    """Pixels of `count` tiles, (count, 3, 24, 24); the first ones do not depend on `count`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(3, 24, 24, generator=generator) for _ in range(count)])


def left_pad(rows: Sequence[torch.Tensor], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Rows of (1, length) as one batch, padded on the left: `input_ids` and `attention_mask`."""
    length = max(ids.shape[1] for ids in rows)
    padded = [torch.nn.functional.pad(ids, (length - ids.shape[1], 0), value=pad_id) for ids in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (length - ids.shape[1], 0)) for ids in rows]
    return {"input_ids": torch.cat(padded), "attention_mask": torch.cat(masks)}


def greedy(model, ids, **kwargs):
    """Ids of the likeliest continuation, seven tokens of it, behind the prompt."""
    options = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **options)


def new_tokens(model, ids, **kwargs):
    """What `greedy` adds to the prompt, as lists."""
    return greedy(model, ids, **kwargs)[:, ids.shape[1] :].tolist()


def reference_generate(model, ids, pixel_values, steps=7):
    """Greedy ids of one row from whole passes without any cache."""
    for _ in range(steps):
        logits = model(ids, pixel_values=pixel_values, use_cache=False, view="multimodal").logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        if ids[0, -1] == model.generation_config.eos_token_id:
            break
    return ids
