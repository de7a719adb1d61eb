"""Chats as lines of a file and as messages, and a tiny processor with templates that end answers in different ways."""

import numpy as np
from PIL import Image
from tiny_models import VOCABULARY, tiny_tokenizer

from modeling_genieblue import GenieBlueProcessor

IMAGE_TOKENS = 4
CHAT_TEMPLATES = {
    # A newline follows the token that ends a turn, as in ChatML.
    "newline-after-end": None,
    "spaces-around": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'system' %}{{ m['content'] }}\n"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # Qwen3: an empty thought before the last answer, none before earlier ones.
    "thought-before-last": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "end-token-once": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}"
    ),
}


def make_processor(template: str | None = None, **options) -> GenieBlueProcessor:
    tokenizer = tiny_tokenizer(add_bos=template == CHAT_TEMPLATES["spaces-around"])
    if template is not None:
        tokenizer.chat_template = template
    sizes = {"image_token_id": VOCABULARY, "image_seq_length": IMAGE_TOKENS, "tile_size": 24, "max_tiles": 4}
    return GenieBlueProcessor.from_base(tokenizer, **sizes, **options)


def picture(width: int = 48, height: int = 24) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) % 251
    return Image.fromarray(pixels.astype(np.uint8))


def turn(role: str, *content) -> dict:
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def good_line(text: str = "Seven.", **more) -> dict:
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}], **more}


def llava_line(question: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}], **more}
