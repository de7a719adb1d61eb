"""Vision tower and projector as an `mmproj` file of llama.cpp's projector type `lfm2`, which is the same network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFType, GGUFWriter, VisionProjectorType, get_tensor_name_map
from torch import nn

from conversion.llamacpp.gguf_file import write_gguf

# Behind which llama.cpp's `lfm2` puts an image, and before which: mtmd.cpp.
IMAGE_PREFIX, IMAGE_SUFFIX = "<|image_start|>", "<|image_end|>"
IN_FLOAT32 = ("patch_embd.weight", "position_embd.weight")  # as llama.cpp's converter has them
RENAMED = {
    "multi_modal_projector.norm.": "multi_modal_projector.layer_norm.",
    "vision_tower.": "vision_tower.vision_model.",
}


def check_vision(config: Any, processor: Any) -> None:
    """`ValueError` with every reason why llama.cpp would not compute the same from an image as the model does."""
    if problems := [*vision_problems(config, processor)]:
        raise ValueError(
            f"llama.cpp cannot run the vision side of this GenieBlue as it is: {' '.join(problems)} With "
            "--language-only (`language_only=True`) the adapter is written alone."
        )


def vision_problems(config: Any, processor: Any) -> Iterator[str]:
    """Reasons why `lfm2` differs from this vision side, one sentence each."""
    vision = config.vision_config
    side, step = vision.image_size, vision.patch_size * config.downsample_factor
    if side % step:
        yield (
            f"A tile is {side} pixels wide, and llama.cpp scales it to a multiple of {step} (patch size × "
            f"{config.downsample_factor}): a SigLIP of such a size is needed, as the ones with patches of 16 pixels."
        )
    if vision.hidden_act != "gelu_pytorch_tanh":
        yield f"The tower's activation is {vision.hidden_act!r}, llama.cpp's is 'gelu_pytorch_tanh'."
    if vision.num_channels != 3:
        yield f"The tower sees {vision.num_channels} channels, llama.cpp reads 3."
    texts = processor.image_prefix, processor.image_suffix
    if texts != (IMAGE_PREFIX, IMAGE_SUFFIX):
        yield (
            f"Around a tile its processor writes {texts[0]!r} and {texts[1]!r}, llama.cpp {IMAGE_PREFIX!r} and "
            f"{IMAGE_SUFFIX!r}, which must be trained: `genieblue init --image-prefix '{IMAGE_PREFIX}' "
            f"--image-suffix '{IMAGE_SUFFIX}'`."
        )
    pre_tokenizer = getattr(getattr(processor.tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if "ByteLevel" not in str(pre_tokenizer):
        yield (
            "The base's tokenizer is not a byte-level one, and llama.cpp may split a text around an image differently "
            "than it does."
        )


def write_mmproj(model: Any, processor: Any, path: Path) -> None:
    """Writes the vision tower (without its pooling head) and the projector of a loaded GenieBlue."""
    config, images = model.config, processor.image_processor
    vision = config.vision_config
    # The map takes the projector's layers 1 and 2 for blocks too.
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, max(vision.num_hidden_layers, 3))
    sources: dict[str, torch.Tensor] = {}
    for part in ("vision_tower", "multi_modal_projector"):
        module: nn.Module = getattr(model, part)
        for key, value in module.state_dict().items():
            if not key.startswith("head."):
                sources[_mmproj_name(f"{part}.{key}", names)] = value

    def settings(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MMPROJ)
        writer.add_name(path.parent.name)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(VisionProjectorType.LFM2)
        writer.add_vision_projection_dim(config.text_config.hidden_size)
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        writer.add_vision_block_count(vision.num_hidden_layers)
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_projector_scale_factor(config.downsample_factor)
        writer.add_vision_image_mean(images.image_mean)
        writer.add_vision_image_std(images.image_std)
        writer.add_vision_use_gelu(True)

    tensors = {name: (value.shape, _stored_type(name, value)) for name, value in sources.items()}
    write_gguf(path, "clip", settings, tensors, sources.__getitem__)


def _mmproj_name(key: str, names: Any) -> str:
    for own, other in RENAMED.items():
        if key.startswith(own):
            key = other + key.removeprefix(own)
            break
    if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
        raise ValueError(f"{key} has no name in llama.cpp's files of projector type 'lfm2': use --language-only.")
    return name


def _stored_type(name: str, value: torch.Tensor) -> torch.dtype:
    return torch.float32 if value.ndim == 1 or name.endswith(IN_FLOAT32) else value.dtype
