"""Processors of the tiny VLMs of several families, without their videos, which would need torchvision."""

from pathlib import Path
from typing import Any

from tiny_models import tiny_tokenizer
from tiny_vlms import IMAGE_ID, tiny_vlm_pair
from transformers import (
    AutoModelForCausalLM,
    Idefics3Processor,
    InternVLProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from modeling_genieblue import GenieBlueForConditionalGeneration, VlmGenieBlueProcessor


class InternVLImages(InternVLProcessor):
    """InternVL's, for images."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, None, image_seq_length=4, **kwargs)


class QwenImages(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, for images."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, None, **kwargs)


class SmolVLMImages(SmolVLMProcessor):
    """SmolVLM's, for images."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, None, image_seq_len=4, **kwargs)

    apply_chat_template = ProcessorMixin.apply_chat_template  # its own asks how many frames a video has


processing_smolvlm.num2words = str  # it would write the number of a video's frames

SQUARE = {"height": 28, "width": 28}
# family -> the tokens in front of id 200, of which the last is the image's, and the processor of a tokenizer
PROCESSORS: dict[str, tuple[list[str], Any]] = {
    "idefics3": (
        ["<end_of_utterance>", "<global-img>", "<fake_token_around_image>", "<image>"],
        lambda tokenizer, **options: Idefics3Processor(
            Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
            tokenizer, image_seq_len=4, **options,
        ),
    ),
    "smolvlm": (
        ["<end_of_utterance>", "<global-img>", "<fake_token_around_image>", "<image>"],
        lambda tokenizer, **options: SmolVLMImages(
            SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}), tokenizer,
            **options,
        ),
    ),
    "internvl": (
        ["<video>", "</img>", "<img>", "<IMG_CONTEXT>"],
        lambda tokenizer, **options: InternVLImages(GotOcr2ImageProcessorPil(size=SQUARE), tokenizer, **options),
    ),
    "qwen2_5_vl": (
        ["<|video_pad|>", "<|vision_end|>", "<|vision_start|>", "<|image_pad|>"],
        lambda tokenizer, **options: QwenImages(
            Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}), tokenizer, **options
        ),
    ),
}  # fmt: skip
PLACEHOLDERS = {
    "idefics3": "<image>", "smolvlm": "<image>", "internvl": "<IMG_CONTEXT>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}  # fmt: skip
TEMPLATE = (
    "{%% for message in messages %%}<|{{ message['role'] }}|>{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{{ eos_token }}\n"
    "{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)


def _vlm_tokenizer(tokens: list[str]) -> PreTrainedTokenizerBase:
    """The base's tokenizer with a VLM's own special tokens in front of id 200."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(IMAGE_ID + 1 - len(tokens) - len(tokenizer))])
    tokenizer.add_tokens(tokens, special_tokens=True)
    names = {"<video>": "video", "</img>": "end_image", "<img>": "start_image", "<IMG_CONTEXT>": "context_image"}
    for token, name in names.items():  # as InternVL's tokenizer has them
        if token in tokens:
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def tiny_vlm_processor(family: str) -> Any:
    """The processor of a tiny VLM of `family`, with a template."""
    tokens, make = PROCESSORS[family]
    own = make(_vlm_tokenizer(tokens), chat_template=TEMPLATE % PLACEHOLDERS[family])
    assert own.tokenizer.convert_tokens_to_ids(tokens[-1]) == IMAGE_ID
    return own


def tiny_genieblue_of(
    family: str, base_folder: Path | None = None, pair: Any = None, **options: Any
) -> tuple[GenieBlueForConditionalGeneration, VlmGenieBlueProcessor]:
    """A GenieBlue of a tiny VLM, by default two of four blocks copied, and its processor; always the same weights.

    With a folder, the base is saved there and recorded as such. `pair` replaces the VLM and the base; `options` are
    those of `from_vlm`.
    """
    vlm, base = pair or tiny_vlm_pair(family)
    if base_folder is not None:
        base.save_pretrained(base_folder)
        tiny_tokenizer().save_pretrained(base_folder)
        base = AutoModelForCausalLM.from_pretrained(base_folder)
    own = tiny_vlm_processor(family)
    options = {"replicated_layers": [1, 3], "lora_rank": 4, **options}
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, **options)
    for each in (base, vlm, model):
        each.generation_config.eos_token_id = own.tokenizer.eos_token_id
    return model, VlmGenieBlueProcessor(tiny_tokenizer(), own)
