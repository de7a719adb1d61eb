"""What a user does with a GenieBlue of the Hub, done in one environment: only torch, transformers, peft and Pillow.

Run as `python one_environment.py REQUEST.json`; writes its findings to the file that the request names.
"""

import importlib.metadata
import json
import sys
import traceback
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

LIBRARIES = ("transformers", "peft", "huggingface_hub", "tokenizers", "torch")
OPTIONS = {"do_sample": False, "max_new_tokens": 5}
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def load(source):
    return AutoModel.from_pretrained(source, trust_remote_code=True).eval()


def scan() -> Image.Image:
    """Three tiles, all different."""
    return Image.linear_gradient("L").resize((48, 24)).convert("RGB")


@torch.no_grad()
def text_answer(model, ids) -> list[torch.Tensor]:
    return [model(ids).logits, model.generate(ids, **OPTIONS)]


@torch.no_grad()
def image_answer(model, processor) -> list[torch.Tensor]:
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    inputs = processor(text=prompt, images=scan(), return_tensors="pt")
    return [model(**inputs).logits, model.generate(**inputs, **OPTIONS)]


def equal(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Checks:
    """The steps, in order; what one of them makes the next ones use."""

    def __init__(self, request: dict):
        self.request = request
        self.base_id, self.repo_id = request["base"], request["repo"]
        self.ids = torch.arange(20, 29)[None]

    def image(self) -> None:
        """An image is answered as where the model was saved."""
        self.model = load(self.repo_id)
        self.processor = AutoProcessor.from_pretrained(self.repo_id, trust_remote_code=True)
        self.base = AutoModelForCausalLM.from_pretrained(self.base_id).eval()
        assert type(self.model).__module__.startswith("transformers_modules."), type(self.model).__module__
        self.answer = image_answer(self.model, self.processor)
        if (expected := self.request.get("image_answer")) is not None:
            torch.testing.assert_close(self.answer[0], torch.tensor(expected[0]), atol=1e-4, rtol=1e-4)
            assert self.answer[1].tolist() == expected[1]

    def text(self) -> None:
        """A text is answered as by the base, bit for bit, and the base is not changed by that."""
        expected = text_answer(self.base, self.ids)
        assert equal(text_answer(self.model, self.ids), expected)
        as_causal = AutoModelForCausalLM.from_pretrained(self.repo_id, trust_remote_code=True)
        assert equal(text_answer(as_causal, self.ids), expected)
        on_given_base = AutoModelForImageTextToText.from_pretrained(
            self.repo_id, trust_remote_code=True, base_model=self.base
        )
        assert equal(text_answer(on_given_base, self.ids), expected)
        assert equal(text_answer(self.base, self.ids), expected)
        assert equal(image_answer(on_given_base, self.processor), self.answer)

    def processing(self) -> None:
        """Texts are tokenized as by the base's tokenizer; a request with an image is the same in one call."""
        tokenizer = AutoTokenizer.from_pretrained(self.base_id)
        words = "What is in the image?"
        chat = [{"role": "user", "content": words}]
        assert self.processor(text=words)["input_ids"] == tokenizer(words)["input_ids"]
        options = {"add_generation_prompt": True, "tokenize": True}
        assert self.processor.apply_chat_template(chat, **options) == list(
            tokenizer.apply_chat_template(chat, return_dict=True, **options)["input_ids"]
        )
        whole = self.processor.apply_chat_template(
            CHAT, images=scan(), return_dict=True, return_tensors="pt", return_mm_token_type_ids=True, **options
        )
        prompt = self.processor.apply_chat_template(CHAT, add_generation_prompt=True)
        parts = self.processor(text=prompt, images=scan(), return_tensors="pt")
        assert torch.equal(whole["input_ids"], parts["input_ids"])
        assert torch.equal(whole["pixel_values"], parts["pixel_values"])
        is_image = whole["input_ids"] == self.processor.image_token_id
        assert torch.equal(whole["mm_token_type_ids"].bool(), is_image) and is_image.sum() == 12

    def training(self) -> None:
        """A step changes image answers and no text."""
        model = load(self.repo_id)
        before = text_answer(model, self.ids)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
        model.train()(self.ids, labels=self.ids).loss.backward()
        optimizer.step()
        assert equal(text_answer(model.eval(), self.ids), before)
        assert not torch.equal(image_answer(model, self.processor)[0], self.answer[0])

    def saving(self) -> None:
        """What is saved here is loaded here, with the same answers."""
        folder = self.request["folder"]
        self.model.save_pretrained(folder)
        assert equal(
            image_answer(load(folder), AutoProcessor.from_pretrained(folder, trust_remote_code=True)), self.answer
        )

    def stock_peft(self) -> None:
        """PEFT alone loads the adapter onto the base from its subfolder."""
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(self.base_id)
        adapted = PeftModel.from_pretrained(base, self.repo_id, subfolder="language_adapter").eval()
        with torch.no_grad():
            expected = self.model(self.ids, view="multimodal").logits
            torch.testing.assert_close(adapted(self.ids).logits, expected, atol=1e-4, rtol=1e-4)

    def pipe(self) -> None:
        """transformers' pipelines answer as the model and as the base do."""
        pipe = pipeline("image-text-to-text", model=self.repo_id, trust_remote_code=True)
        content = [{"type": "image", "image": scan()}, {"type": "text", "text": "What is it?"}]
        (found,) = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=OPTIONS)
        prompt_length = self.answer[0].shape[1]
        expected = self.processor.decode(self.answer[1][0, prompt_length:], skip_special_tokens=True)
        assert found["generated_text"].strip() == expected.strip(), (found["generated_text"], expected)
        texts = [
            pipeline("text-generation", model=model, trust_remote_code=True)("The answer is", **OPTIONS)
            for model in (self.repo_id, self.base_id)
        ]
        assert texts[0] == texts[1], texts

    @torch.no_grad()
    def own_code(self) -> None:
        """With a base whose own code knows `past_key_values` alone, answers are those of passes without a cache."""
        model = load(self.request["own_code_repo"])
        base = AutoModelForCausalLM.from_pretrained(self.request["own_code_base"], trust_remote_code=True).eval()
        assert equal(text_answer(model, self.ids), text_answer(base, self.ids))
        processor = AutoProcessor.from_pretrained(self.request["own_code_repo"], trust_remote_code=True)
        prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        inputs = processor(text=prompt, images=scan(), return_tensors="pt")
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        found = model.generate(ids, pixel_values=pixels, **OPTIONS)
        for _ in range(found.shape[1] - ids.shape[1]):
            logits = model(ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert found.tolist() == ids.tolist()

    def others(self) -> None:
        """Folders that other environments saved."""
        for folder in self.request.get("load", ()):
            assert equal(image_answer(load(folder), self.processor), self.answer), folder


STEPS = ("image", "text", "processing", "training", "saving", "stock_peft", "pipe", "own_code", "others")


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    checks = Checks(request)
    findings = {"versions": {name: importlib.metadata.version(name) for name in LIBRARIES}, "failures": {}}
    for name in request.get("steps", STEPS):
        try:
            getattr(checks, name)()
        except Exception as error:
            findings["failures"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            if name == "image":  # of which all others make use
                break
    if hasattr(checks, "answer"):
        findings["image_answer"] = [tensor.tolist() for tensor in checks.answer]
    Path(request["findings"]).write_text(json.dumps(findings))


if __name__ == "__main__":
    main(sys.argv[1])
