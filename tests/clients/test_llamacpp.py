"""An unmodified llama.cpp with one base and our files: both views, text as without us, and answers about images."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from command_line import REPOSITORY
from llama_server import serving, write_base_gguf
from PIL import Image, ImageDraw
from tiny_genieblue import change_adapter
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.llamacpp.export import export_llamacpp
from conversion.llamacpp.vision import IMAGE_PREFIX, IMAGE_SUFFIX
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.model_files_genieblue import read_settings, write_json
from modeling_genieblue.saving_genieblue import processor_for

sys.path.append(str(REPOSITORY / "examples"))
from llamacpp_client import MULTIMODAL_VIEW, TEXT_VIEW, ask, cut_into_tiles, image_prompt, post

pytestmark = pytest.mark.llamacpp

PROMPTS = ("The answer is", "What does the sign on the door say?", "1, 2, 3 and", "Read the number aloud", "door")
TEXTS = {"image_prefix": IMAGE_PREFIX, "image_suffix": IMAGE_SUFFIX}
DEMO = REPOSITORY / "demo-out"
LARGEST_ERROR = 0.02  # of log-probabilities
LARGEST_IMAGE_ERROR = 0.05  # behind a tower that llama.cpp runs partly in half precision
# llama.cpp's converter counts the rows of Gemma's embedding in its tokenizer.json, and takes its pattern for granted.
OTHERS = {"gemma3_text": {"vocab_size": 127, "sliding_window": 512, "sliding_window_pattern": 6}}
# What no LoRA carries is left as it is in the base: that it is measured and named is tested elsewhere.
KEPT = ("_proj.bias", "_norm.weight", "feedforward_layernorm.weight")


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"])
def pair(request, tmp_path_factory):
    """A folder with a base, a GenieBlue on it, the base's GGUF and the export."""
    folder = tmp_path_factory.mktemp(request.param)
    # The heads of all families are 16 wide then: of qwen2 llama.cpp reads no other width than that of the sum.
    save_tiny_base(request.param, folder / "base", hidden_size=64, **OTHERS.get(request.param, {}))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower(image_size=32), lora_rank=4)
    change_adapter(model)
    for block in model.multimodal_language_model.modules():
        if hasattr(block, "modules_to_save"):
            for name, own in block.modules_to_save["default"].named_parameters():
                if name.endswith(KEPT) or request.param == "gemma3_text" and name == "post_attention_layernorm.weight":
                    own.data.copy_(block.original_module.get_parameter(name))
    processor = processor_for(model.config, AutoTokenizer.from_pretrained(folder / "base"), **TEXTS)
    model.save_pretrained(folder / "genieblue", processor=processor)
    write_base_gguf(folder / "base", type(base).__name__, folder / "base.gguf")
    export_llamacpp(folder / "genieblue", folder / "gguf", base_gguf=folder / "base.gguf")
    return folder


@pytest.fixture(scope="module")
def model(pair):
    return GenieBlueForConditionalGeneration.from_pretrained(pair / "genieblue")


@pytest.fixture(scope="module")
def processor(pair):
    return GenieBlueProcessor.from_pretrained(pair / "genieblue")


@pytest.fixture(scope="module")
def server(pair):
    with serving(pair / "base.gguf", *options_of_card(pair / "gguf")) as address:
        yield address


def options_of_card(folder: Path) -> list[str]:
    """Of the server, as the card of an export has them."""
    command = (folder / "README.md").read_text().split("```bash\nllama-server -m base.gguf ")[1].split("```")[0]
    return [str(folder / word) if ".gguf" in word else word for word in command.replace("\\\n", "").split()]


def chat(processor, question: str, images: list[Image.Image]):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([{"role": "user", "content": parts}], **options)


def next_tokens(server, prompt, view) -> dict[int, float]:
    """Log-probabilities of the 20 likeliest next tokens."""
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0, "lora": view}
    (first,) = post(server, "/completion", request)["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in first["top_logprobs"]}


@torch.no_grad()
def largest_error(found: dict[int, float], view, **inputs) -> float:
    expected = view(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
    assert len(found) == 20
    return max(abs(value - float(expected[token])) for token, value in found.items())


def test_each_view_gives_the_log_probabilities_of_its_own(server, model, processor):
    for prompt in PROMPTS:
        ids = processor.tokenizer(prompt).input_ids
        row = torch.tensor([ids])
        text, multimodal = (next_tokens(server, ids, view) for view in (TEXT_VIEW, MULTIMODAL_VIEW))
        assert largest_error(text, model.language_model, input_ids=row) < LARGEST_ERROR
        assert largest_error(multimodal, model.multimodal_language_model, input_ids=row) < LARGEST_ERROR
        assert largest_error(text, model.multimodal_language_model, input_ids=row) > 5 * LARGEST_ERROR


@pytest.fixture(scope="module")
def base_alone(pair):
    with serving(pair / "base.gguf") as address:
        yield address


def test_text_is_that_of_the_base_alone(server, base_alone, processor):
    for prompt in PROMPTS:
        assert next_tokens(server, prompt, TEXT_VIEW) == next_tokens(base_alone, prompt, TEXT_VIEW)
        answers = [ask(each, processor, prompt, n_predict=16, temperature=0) for each in (server, base_alone)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "view",
    [{}, {"lora": TEXT_VIEW}, {"lora": TEXT_VIEW, "cache_prompt": True}],
    ids=["unnamed", "named", "named-and-cached"],
)
def test_no_cache_gives_text_what_the_multimodal_view_computed(server, base_alone, view):
    options = {"n_predict": 16, "temperature": 0}
    for prompt in PROMPTS:
        expected = post(base_alone, "/completion", {"prompt": prompt, **options})["content"]
        for between in ([], ["0 0 0"]):  # which puts what was there into the server's memory, if it keeps it
            image = {"lora": MULTIMODAL_VIEW, "cache_prompt": True, **options}
            post(server, "/completion", {"prompt": prompt, **image})
            for other in between:
                post(server, "/completion", {"prompt": other, **view, **options})
            assert post(server, "/completion", {"prompt": prompt, **view, **options})["content"] == expected


def drawn(width: int, height: int, text: str) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((2, 2), text, fill="black")
    return image


@pytest.mark.parametrize("sizes", [[(32, 32)], [(64, 32)], [(70, 50), (20, 40)]], ids=["tile", "tiles", "images"])
def test_images_give_the_log_probabilities_of_the_multimodal_view(server, model, processor, sizes):
    images = [drawn(*size, str(number)) for number, size in enumerate(sizes, 7)]
    inputs = chat(processor, PROMPTS[1], images)
    tiles = [tile for image in images for tile in cut_into_tiles(processor, image)]
    files = [Image.open(io.BytesIO(base64.b64decode(tile))) for tile in tiles]
    pixels = torch.stack([torch.tensor(numpy.asarray(file)).permute(2, 0, 1) for file in files]) / 127.5 - 1
    # The padding is between two values of a PNG.
    assert (pixels - inputs["pixel_values"]).abs().max() < 0.004
    embeds = model.embed_request(inputs["input_ids"], pixels)
    found = next_tokens(server, image_prompt(server, processor, PROMPTS[1], images), MULTIMODAL_VIEW)
    assert largest_error(found, model.multimodal_language_model, inputs_embeds=embeds) < LARGEST_IMAGE_ERROR
    without = model.embed_request(inputs["input_ids"], torch.zeros_like(inputs["pixel_values"]))
    assert largest_error(found, model.multimodal_language_model, inputs_embeds=without) > 2 * LARGEST_IMAGE_ERROR


def test_answers_to_held_out_scans_are_those_of_the_multimodal_view(tmp_path):
    # The demo was trained without llama.cpp's texts around tiles: they change its answers, in both programs alike.
    assert DEMO.exists(), f"{DEMO} is missing: `make test-llamacpp` makes it"
    for part in ("base", "genieblue"):
        shutil.copytree(DEMO / part, tmp_path / part)
    settings = read_settings(tmp_path / "genieblue/processor_config.json")
    write_json(tmp_path / "genieblue/processor_config.json", settings | TEXTS)
    write_base_gguf(tmp_path / "base", "LlamaForCausalLM", tmp_path / "base.gguf", pre="smollm")
    export_llamacpp(tmp_path / "genieblue", tmp_path / "gguf", base_gguf=tmp_path / "base.gguf")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "genieblue")
    processor = GenieBlueProcessor.from_pretrained(tmp_path / "genieblue")
    samples = (DEMO / "held-out/answers.jsonl").read_text().splitlines()[::20]
    same = 0
    with serving(tmp_path / "base.gguf", *options_of_card(tmp_path / "gguf")) as address:
        for sample in map(json.loads, samples):
            (image, question) = sample["messages"][0]["content"]
            picture = Image.open(DEMO / "held-out" / image["image"])
            inputs = chat(processor, question["text"], [picture])
            new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            answer = ask(address, processor, question["text"], [picture], n_predict=8, temperature=0)
            same += answer == processor.decode(new, skip_special_tokens=True)
    assert same >= 0.96 * len(samples)  # two next tokens may be as likely, up to rounding


def test_a_text_that_holds_the_servers_marker_is_refused(server, processor):
    marker = post(server, "/props")["media_marker"]
    with pytest.raises(ValueError, match="marks an image in llama.cpp"):
        image_prompt(server, processor, f"What is {marker}?", [drawn(32, 32, "7")])
