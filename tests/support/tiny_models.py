"""Tiny random bases, vision towers and tokenizers for tests: real architectures, a few thousand weights each."""

import functools
import shutil
from pathlib import Path

import torch
from bluelm_remote_code.configuration_bluelm import BlueLMConfig
from bluelm_remote_code.modeling_bluelm import BlueLMForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

BLUELM_CODE = Path(__file__).parent / "bluelm_remote_code"
SEED = 20250306
# Rows of the embedding; fewer tokens have a name, as in bases whose vocabulary is padded to a round number.
VOCABULARY = 128
TOKENIZER_LENGTH = 120
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

TRAINING_TEXT = """The answer is in the question, and the question is in the other answer.
What does the sign on the door say? It says that the shop is closed on Sunday.
How many digits are there in this image? There are four of them: 1, 2, 3 and 4.
A tall tree stands near the river; in the evening its shadow reaches the other side.
Read the number aloud, then write it down and tell me whether it is even or odd.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# family -> (model_type, what differs from COMMON_SHAPE). A family is an architecture or a variant of one that has
# broken, or could break, code that takes every base for a plain Llama.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),  # also the layout of SmolLM and SmolLM2
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),  # biases on q, k, v
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),  # q and k norms, wide heads
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 6}),
    "phi3": ("phi3", {}),  # fused qkv_proj and gate_up_proj
    "gemma3_text": (
        "gemma3_text",  # scaled embeddings, four norms per block, two rotary embeddings, sliding and full attention
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2},
    ),
    "smollm3": ("smollm3", {}),  # every fourth block without rotary embedding
    "gemma2": (
        "gemma2",  # logit soft-capping
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    ),
    "olmo2": ("olmo2", {}),  # norms after attention and MLP
    "granite": (
        "granite",  # multipliers on embeddings, residuals, attention and logits
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": (
        "cohere",
        {"tie_word_embeddings": True, "logit_scale": 0.5},
    ),  # parallel residual
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),  # LayerNorms, partial rotary
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True}),  # c_fc and c_proj instead of gate, up and down
    "bluelm": ("BlueLM", {"normalize_given_embeds": False}),  # remote code; token lookups pass a LayerNorm
    "bluelm-outside": ("BlueLM", {"normalize_given_embeds": True}),  # remote code; everything passes it
}
# What the project promises; the rest of FAMILIES shows that nothing is special about these.
PROMISED_FAMILIES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mistral",
    "mistral-sliding",
    "phi3",
    "gemma3_text",
    "smollm3",
    "bluelm",
    "bluelm-outside",
)
REMOTE_CODE_FAMILIES = ("bluelm", "bluelm-outside")
FAMILIES_WITH_BOS = (
    "llama",
    "llama-tied",
    "mistral",
    "mistral-sliding",
    "gemma2",
    "gemma3_text",
    *REMOTE_CODE_FAMILIES,
)

# Weights of 0.2 at this width let every block move the logits, so that a wrong or missing one shows.
COMMON_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """Config of a tiny base of `family` (a key of FAMILIES), with `overrides` of any of its fields."""
    model_type, differences = FAMILIES[family]
    fields = {**COMMON_SHAPE, **differences, **overrides}
    if model_type == BlueLMConfig.model_type:
        auto_map = {
            "AutoConfig": "configuration_bluelm.BlueLMConfig",
            "AutoModelForCausalLM": "modeling_bluelm.BlueLMForCausalLM",
        }
        return BlueLMConfig(auto_map=auto_map, **fields)
    return AutoConfig.for_model(model_type, **fields)


def tiny_base(family: str, *, seed: int = SEED, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """Tiny causal LM of `family` in eval mode; equal arguments give equal weights, whatever ran before."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, BlueLMConfig):
            model = BlueLMForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        _roughen_vectors(model)
    return model.to(dtype).eval()


def save_tiny_base(family: str, folder: str | Path, *, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """Saves `tiny_base(family, ...)`, its tokenizer and any remote code as a base repo; returns the folder."""
    folder = Path(folder)
    model = tiny_base(family, dtype=dtype, **overrides)
    model.save_pretrained(folder)
    tiny_tokenizer(add_bos=family in FAMILIES_WITH_BOS).save_pretrained(folder)
    if family in REMOTE_CODE_FAMILIES:
        for source in sorted(BLUELM_CODE.glob("*.py")):
            shutil.copy(source, folder)
    return folder


def tiny_vision_tower(*, seed: int = SEED, **overrides) -> SiglipVisionModel:
    """Tiny SigLIP tower in eval mode: 24x24 images in 3x3 patches of 8x8, so that 2x2 downsampling has to pad."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = SiglipVisionModel(SiglipVisionConfig(**fields))
        _roughen_vectors(tower)
    return tower.eval()


def tiny_tokenizer(chat_template: bool = True, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of 120 tokens that round-trips printable ASCII; other bytes become `<unk>`.

    With `add_bos` it begins every text with `<s>` as Llama's does, in the chat template too; without, it has no such
    token, like Qwen's.
    """
    tokenizer = Tokenizer.from_str(_trained_tokenizer_json())
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
        )
    template = ("{{ bos_token }}" if add_bos else "") + CHAT_TEMPLATE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if add_bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=COMMON_SHAPE["max_position_embeddings"],
        chat_template=template if chat_template else None,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _trained_tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    byte_level_space, byte_level_newline = "\u0120", "\u010a"
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_LENGTH,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=[*printable, byte_level_space, byte_level_newline],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(keepends=True), trainer)
    return tokenizer.to_str()


@torch.no_grad()
def _roughen_vectors(model: PreTrainedModel) -> None:
    """Adds noise to norms and biases, which start at one and zero and would hide that they are dropped or swapped."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
