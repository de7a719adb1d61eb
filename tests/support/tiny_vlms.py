"""Tiny random VLMs of each family, trained-looking from a tiny base, and requests for them."""

from pathlib import Path

import torch
import transformers
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SEED = 20250306
IMAGE_ID, ROWS, BASE_ROWS = 199, 200, 190  # the VLM has more tokens than its base
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": 196,
    "vision_start_token_id": 198,
    "vision_end_token_id": 197,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}


def _pixels(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# family -> base's class of configuration, its fields, the VLM's class of configuration, its fields, tokens an image
FAMILIES = {
    "llava": ("LlamaConfig", {}, "LlavaConfig", {"vision_config": {"model_type": "siglip_vision_model", **VISION},
        "vision_feature_select_strategy": "full", "vision_feature_layer": -1, "image_token_index": IMAGE_ID}, 16),
    "llava_next": ("LlamaConfig", {}, "LlavaNextConfig", {
        "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": IMAGE_ID,
        "image_grid_pinpoints": [[28, 28]], "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, 0),
    "llava_onevision": ("Qwen2Config", {}, "LlavaOnevisionConfig", {
        "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": IMAGE_ID,
        "image_grid_pinpoints": [[28, 28]], "vision_feature_layer": -1}, 0),
    "internvl": ("Qwen2Config", {}, "InternVLConfig", {"vision_config": {**VISION, "image_size": (28, 28),
        "patch_size": (7, 7)}, "image_token_id": IMAGE_ID, "image_seq_length": 4}, 4),
    "idefics3": ("LlamaConfig", {}, "Idefics3Config", {"vision_config": VISION, "image_token_id": IMAGE_ID,
        "scale_factor": 2}, 4),
    "smolvlm": ("LlamaConfig", {}, "SmolVLMConfig", {"vision_config": VISION, "image_token_id": IMAGE_ID,
        "scale_factor": 2}, 4),
    "qwen2_vl": ("Qwen2Config", {}, "Qwen2VLConfig", {"vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 4,
        "hidden_size": 32, "patch_size": 14, "mlp_ratio": 2}, **QWEN_IDS}, 4),
    "qwen2_5_vl": ("Qwen2Config", {}, "Qwen2_5_VLConfig", {"vision_config": {**QWEN_VISION, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1]}, **QWEN_IDS}, 4),
    "qwen3_vl": ("Qwen3Config", {"head_dim": 8}, "Qwen3VLConfig", {"vision_config": {**QWEN_VISION,
        "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **QWEN_IDS}, 4),
    "gemma3": ("Gemma3TextConfig", GEMMA, "Gemma3Config", {"vision_config": VISION, "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_ID, "image_token_id": IMAGE_ID, "boi_token_index": 198, "eoi_token_index": 197}, 4),
    "paligemma": ("GemmaConfig", {"head_dim": 8}, "PaliGemmaConfig", {"vision_config": {
        "model_type": "siglip_vision_model", **VISION, "projection_dim": 32, "vision_use_head": False},
        "projection_dim": 32, "image_token_index": IMAGE_ID}, 16),
}  # fmt: skip


def tiny_vlm_pair(family: str, *, change: float = 0.02, dtype: torch.dtype = torch.float32, **text):
    """A base and a VLM of `family` whose language model is the base plus noise, with more tokens than the base."""
    base_kind, base_fields, kind, fields, _ = FAMILIES[family]
    base_config = getattr(transformers, base_kind)(**{**TEXT, "vocab_size": BASE_ROWS, **base_fields, **text})
    text_fields = {**TEXT, "vocab_size": ROWS, **base_fields, **text}
    if family.startswith("qwen"):
        text_fields["rope_parameters"] = MROPE
    else:
        text_fields["model_type"] = base_config.model_type
    tied = text_fields["tie_word_embeddings"]
    config = getattr(transformers, kind)(text_config=text_fields, tie_word_embeddings=tied, **fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        base = AutoModelForCausalLM.from_config(base_config)
        vlm = AutoModelForImageTextToText.from_config(config)
        for parameter in (*base.parameters(), *vlm.parameters()):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        decoder = dict(vlm.get_decoder().named_parameters())
        for name, value in base.get_decoder().named_parameters():
            own = decoder[name]
            own[: len(value)] = value
            if name != "embed_tokens.weight":
                own.add_(torch.randn_like(own), alpha=change)
        if not tied:
            head = base.get_output_embeddings().weight
            vlm.get_output_embeddings().weight[: len(head)] = head
        vlm.get_input_embeddings().weight[7] += 1  # a row that training changed
    return vlm.to(dtype).eval(), base.to(dtype).eval()


def save_tiny_vlm_pair(folder: Path, dtype: torch.dtype = torch.float32, **options) -> tuple[Path, Path]:
    """Saves a LLaVA with a processor as `folder/vlm`, and its base as `folder/base`; returns both."""
    vlm, base = tiny_vlm_pair("llava", dtype=dtype, **options)
    tokenizer, own = tiny_tokenizer(add_bos=True), tiny_tokenizer(add_bos=True)
    own.add_tokens(["<image>"], special_tokens=True)
    vlm.config.image_token_id = own.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        own,
        patch_size=7,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template="{{ bos_token }}{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        " ASSISTANT:{% endfor %}",
    )
    for name, parts in (("vlm", (vlm, processor)), ("base", (base, tokenizer))):
        for part in parts:
            part.save_pretrained(folder / name)
    return folder / "vlm", folder / "base"


def image_request(family: str, images: int = 1, dtype: torch.dtype = torch.float32) -> dict:
    """Inputs of one row with `images` images and text around them, as the family's processor gives them."""
    count = FAMILIES[family][4]
    request: dict = {}
    if family.startswith("qwen"):
        channels = 3 * 2 * 14 * 14
        request = {
            "pixel_values": _pixels(16 * images, channels),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
        }
    elif family in ("idefics3", "smolvlm"):
        request = {"pixel_values": _pixels(1, images, 3, 28, 28)}
    elif family in ("llava_next", "llava_onevision"):
        request = {"pixel_values": _pixels(images, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]] * images)}
        count = 16 + 16 + 4  # the base tile, one cut tile, and a newline after each of its rows
    else:
        request = {"pixel_values": _pixels(images, 3, 28, 28)}
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randint(3, 180, (4,), generator=generator)]
    for _ in range(images):
        start = [198] if family.startswith("qwen") else []
        pieces += [torch.tensor([*start, *[IMAGE_ID] * count]), torch.randint(3, 180, (3,), generator=generator)]
    ids = torch.cat(pieces)[None]
    kinds = (ids == IMAGE_ID).long()
    if family.startswith("qwen"):
        request["mm_token_type_ids"] = kinds
    if family in ("gemma3", "paligemma"):
        request["token_type_ids"] = kinds
    request["pixel_values"] = request["pixel_values"].to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **request}


def assert_answers_as_the_vlm(model, vlm_head, own: tuple[torch.Tensor, torch.Tensor], request: dict) -> None:
    """What goes into the head is the VLM's own, bit for bit, and so are the logits but for their rounding.

    `own` is what `before_the_head` gave for the VLM. Rows of the head that differ from the base's are multiplied apart
    from the others, and the last bit of a product depends, on some processors, on how many rows it has.
    """
    states, logits = before_the_head(model, vlm_head, request)
    assert torch.equal(states, own[0])
    torch.testing.assert_close(logits, own[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def before_the_head(model, head, request: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a model's head, and its logits."""
    seen = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(**request).logits
    handle.remove()
    return seen[-1], logits
