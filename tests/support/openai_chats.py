"""Chats as clients of OpenAI send them, with drawn images, and the answers that transformers gives to them."""

import base64
import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

LONG = {"role": "system", "content": "The answer is in the question, and the question is in the other answer. " * 3}


def image_url(number: int, width: int = 48, height: int = 24, mode: str = "RGB", kind: str = "PNG") -> str:
    """A drawn image as a `data:` URL; equal arguments give equal images."""
    image = Image.new("RGB", (width, height), (37 * number % 256, 91 * number % 256, 153 * number % 256))
    draw = ImageDraw.Draw(image)
    draw.ellipse((number % width // 2, 2, width - 3, height - 3), fill=(250, 40 + number, 90))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image(number: int, **options) -> dict:
    """An image part."""
    return {"type": "image_url", "image_url": {"url": image_url(number, **options)}}


def user(*content: str | dict) -> dict:
    """A message of the user; one text alone is a string."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in content],
    }


def mixed_chats() -> dict[str, list[dict]]:
    """Chats of both kinds by name; names of those with images begin with `image`."""
    answered = {"role": "assistant", "content": "It says that."}
    return {
        "text": [user("What does the sign say?")],
        "text with a system prompt": [LONG, user("How many digits?")],
        "text with a placeholder": [user("What is <image> here?")],
        "image": [user(image(1), "What is it?")],
        "image of several tiles": [user(image(2, width=72, height=70), "Read the number.")],
        "image behind the text": [user("Read this:", image(3))],
        "image with a system prompt": [LONG, user(image(4), "How many digits?")],
        "image with the same question": [LONG, user(image(5), "How many digits?")],
        "images": [user(image(6), "and", image(7, width=24), "Which is it?")],
        "image in a later turn": [user("Hello"), answered, user(image(8), "And this?")],
        "images in two turns": [user(image(9), "This?"), answered, user("And <image>?", image(10))],
        "image in an earlier turn": [user(image(11), "This?"), answered, user("Is it even?")],
        "image with transparency": [user(image(12, mode="RGBA"), "What is it?")],
        "image in a palette": [user(image(13, mode="P", kind="GIF"), "What is it?")],
    }


def transformers_answers(
    model_folder: Path, chats: dict[str, list[dict]], max_tokens: int = 12, **image_options: int
) -> dict[str, list]:
    """Greedy ids by name: of the base alone for texts, of the whole model for chats with images."""
    base_folder = model_folder.parent / "base"
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_folder)
    answers = {}
    for name, chat in chats.items():
        has_images = name.startswith("image")
        formatter, answerer = (processor, model) if has_images else (tokenizer, base)
        options = image_options if has_images else {}
        inputs = formatter.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        output = answerer.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        answers[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return answers


@torch.no_grad()
def share_of_likeliest(model_folder: Path, chats: list[list[dict]], answers: list[list[int]]) -> float:
    """Of the tokens of given answers to chats with images, the share that transformers in float32 finds likeliest.

    It gets the answer's own beginning, so that a near tie which rounding turns counts once.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_folder)
    hits = []
    for chat, ids in zip(chats, answers, strict=True):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        likeliest = model(**inputs).logits[0, -len(ids) - 1 : -1].argmax(-1)
        hits += (likeliest == torch.tensor(ids)).tolist()
    return sum(hits) / len(hits)
