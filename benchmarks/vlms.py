"""VLMs to extract from: one on the demo's base, of which training changed every weight, and a full-size random one."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from genieblue.data.vlm_collation import VlmChatCollator
from genieblue.lab.parameters import PRESETS, SIGLIP
from genieblue.lab.pretraining import pretrain
from genieblue.lab.scans import LONGEST_NUMBER, TILE_SIZE, NumberScans, split_scans
from modeling_genieblue import GenieBlueForConditionalGeneration, VlmGenieBlueProcessor

STEPS, BATCH_SIZE, LEARNING_RATE = 1800, 16, 5e-4
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_demo_vlm(demo: Path, out: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Writes a VLM that reads the demo's scans, from its base and vision tower; no weight of it is frozen.

    A killed run goes on from its last checkpoint, beside `out`.
    """
    set_seed(seed)
    base, tokenizer = (each.from_pretrained(demo / "base") for each in (AutoModelForCausalLM, AutoTokenizer))
    tower = GenieBlueForConditionalGeneration.from_pretrained(demo / "genieblue").vision_tower
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    grids = [[TILE_SIZE, TILE_SIZE * columns] for columns in range(1, LONGEST_NUMBER + 1)]
    text = base.config.to_dict() | {"vocab_size": len(tokenizer)}
    config = LlavaNextConfig(
        vision_config=tower.config.to_dict(), text_config=text, image_token_index=len(tokenizer) - 1,
        image_grid_pinpoints=grids, vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=base.config.tie_word_embeddings,
    )  # fmt: skip
    vlm = LlavaNextForConditionalGeneration(config)
    vlm.model.vision_tower.load_state_dict(tower.state_dict())
    state = base.model.state_dict()
    own = vlm.get_input_embeddings().weight.detach().clone()
    own[: len(state["embed_tokens.weight"])] = state["embed_tokens.weight"]
    vlm.get_decoder().load_state_dict(state | {"embed_tokens.weight": own})
    vlm.generation_config = base.generation_config
    images = LlavaNextImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE}, crop_size={"height": TILE_SIZE, "width": TILE_SIZE},
        image_grid_pinpoints=grids, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=tower.config.patch_size, vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )  # fmt: skip
    both = VlmGenieBlueProcessor(AutoTokenizer.from_pretrained(demo / "base"), processor)
    collator = VlmChatCollator(both, stop_ids=[tokenizer.eos_token_id], max_length=256)
    scans = NumberScans(split_scans()[0], steps * BATCH_SIZE, seed=seed + 2)
    pretrain(
        vlm, scans, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, seed=seed, collate=collator,
        checkpoints=out.with_name(f"{out.name}-run"),
    )  # fmt: skip
    for part in (vlm.to(torch.float32), processor):
        part.save_pretrained(out)


def make_full_size_pair(folder: Path, blocks: int) -> None:
    """Writes `base/`, BlueLM-3B-shaped with so many blocks, and `vlm/`, the same with noise and a SigLIP; in bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = PRESETS["bluelm-3b"]
    config.num_hidden_layers = blocks
    base = AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.02)
    names = ["<pad>", "<unk>", "<eos>", *map(chr, range(32, 127))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(dict(zip(names, range(len(names)), strict=True)), "<unk>")),
        pad_token="<pad>", unk_token="<unk>", eos_token="<eos>",
    )  # fmt: skip
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base", max_shard_size="2GB")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    with init_empty_weights():
        settings = LlavaConfig(
            vision_config=SIGLIP, text_config=config, image_token_index=len(names),
            vision_feature_select_strategy="full",
        )  # fmt: skip
        vlm = LlavaForConditionalGeneration(settings)
    own = dict(vlm.named_parameters()).keys() - {f"model.language_model.{name}" for name in base.model.state_dict()}
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.002)
    state = {f"model.language_model.{name}": value for name, value in base.model.state_dict().items()}
    state["lm_head.weight"] = base.lm_head.weight
    state |= {name: torch.randn(vlm.get_parameter(name).shape) * 0.02 for name in own - state.keys()}
    vlm.load_state_dict(state, strict=False, assign=True)
    side = {"height": SIGLIP.image_size, "width": SIGLIP.image_size}
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=side), tokenizer, patch_size=SIGLIP.patch_size,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    for part in (vlm, processor):
        part.save_pretrained(folder / "vlm", max_shard_size="2GB")
