"""A tiny GenieBlue with a LLaVA, whose template writes whole chats, for tests of training and answering."""

from pathlib import Path

from PIL import Image
from tiny_vlms import save_tiny_vlm_pair
from training_setup import COLOURS, chat

from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from modeling_genieblue import GenieBlueForConditionalGeneration, VlmGenieBlueProcessor

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def extract_tiny(folder: Path) -> Path:
    """A GenieBlue of a tiny VLM in `folder`, two of four blocks copied, with a template for chats."""
    vlm, base = save_tiny_vlm_pair(folder)
    output = extract_genieblue(vlm, base, folder / "mine", Choice(copies=2, rank=4)).output
    (output / "vlm" / "chat_template.jinja").write_text(TEMPLATE)
    return output


def load(folder: Path):
    """The GenieBlue in a folder, and its processor."""
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    return model, VlmGenieBlueProcessor.from_pretrained(folder)


def make_image_data() -> list[dict]:
    """Ten samples: eight with an image, one with two and two turns, one of text."""
    pictures = [Image.new("RGB", (28, 28), colour) for colour in COLOURS]
    rows = [chat("<image>\nColour?", f"It is {colour}.", each) for colour, each in zip(COLOURS, pictures, strict=True)]
    more = chat("<image> <image>\nAlike?", "No.", *pictures[:2])
    more["messages"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, red."}]
    return [*rows, more, chat("What is 3?", "A number.")]


def generated(model, processor, sample) -> str:
    """What the VLM itself says about an image."""
    own = processor.vlm_processor
    parts = [{"type": "image", "image": sample["images"][0]}, {"type": "text", "text": "Colour?"}]
    inputs = own.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ids = model.vlm.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return own.tokenizer.decode(ids, skip_special_tokens=True)
