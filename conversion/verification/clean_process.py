"""A script that `verify` runs in a separate process, where a model's own code files must load and answer.

Reads settings as JSON from stdin, writes one line of JSON to stdout. Importing this project's packages is blocked, so
all code must come from the model's repository.
"""

import importlib.abc
import json
import sys
from typing import Any

BARRED = ("modeling_genieblue", "hub_cards", "conversion", "genieblue")


class BarPackages(importlib.abc.MetaPathFinder):
    """Blocks imports of this project's packages, wherever they are installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """`ImportError` for a blocked package; None, which leaves it to other finders, otherwise."""
        if fullname.split(".")[0] in BARRED:
            raise ImportError(f"{fullname} must not be imported here: the repository's own code files must suffice")
        return None


def main() -> None:
    """Loads configuration, processor and model through the auto classes, and answers a request with an image.

    A quantized base is also loaded alone, as by its plain users, and must give the text view's logits.
    """
    sys.meta_path.insert(0, BarPackages())
    settings = json.load(sys.stdin)

    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

    source, hub = settings["model"], {**settings["hub"], "trust_remote_code": True}
    config = AutoConfig.from_pretrained(source, **hub)
    processor = AutoProcessor.from_pretrained(source, **hub)
    model = AutoModel.from_pretrained(source, dtype=settings["dtype"], **settings["base"], **hub)
    if settings["device"]:
        model.to(settings["device"])

    # A VLM's processor expands its own placeholder, by its own template.
    size = getattr(config.vision_config, "image_size", 224)
    template = getattr(processor, "vlm_processor", processor).chat_template
    image = Image.linear_gradient("L").resize((2 * size, size))  # two tiles and a thumbnail
    text = f"{processor.image_token}\n{settings['prompt']}"
    if template is not None:
        content = [{"type": "image"}, {"type": "text", "text": settings["prompt"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[image], return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=settings["max_new_tokens"], do_sample=False)
    report = {
        "modules": {name: type(thing).__module__ for name, thing in
                    (("AutoConfig", config), ("AutoProcessor", processor), ("AutoModel", model))},
        "tiles": len(inputs["pixel_values"]),
        "new_tokens": ids.shape[1] - inputs["input_ids"].shape[1],
        "base_class": None,
    }  # fmt: skip
    if settings["quantized_base"] is not None:
        base = AutoModelForCausalLM.from_pretrained(
            settings["quantized_base"], dtype=settings["dtype"], device_map=settings["device"],
            trust_remote_code=True, **settings["base_hub"],
        )  # fmt: skip
        text = processor(text=settings["prompt"], return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad():
            report["base_is_equal"] = torch.equal(base(input_ids=text).logits, model(input_ids=text).logits)
        report["base_class"] = type(base).__name__
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
