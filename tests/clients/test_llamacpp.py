"""An unmodified llama.cpp with one base and our files: both views, text as without us, and answers about images."""

import sys

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
from modeling_genieblue.saving_genieblue import processor_for

sys.path.append(str(REPOSITORY / "examples"))
from llamacpp_client import MULTIMODAL_VIEW, TEXT_VIEW, ask, image_prompt, post

pytestmark = pytest.mark.llamacpp

PROMPTS = ("The answer is", "What does the sign on the door say?", "1, 2, 3 and", "Read the number aloud", "door")
LARGEST_ERROR = 0.02  # of log-probabilities
# What no LoRA carries is left as it is in the base: that it is measured and named is tested elsewhere.
KEPT = ("_proj.bias", "_norm.weight", "feedforward_layernorm.weight")


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"])
def pair(request, tmp_path_factory):
    """A folder with a base, a GenieBlue on it, the base's GGUF and the export."""
    folder = tmp_path_factory.mktemp(request.param)
    # The heads are as wide as llama.cpp's kernels for attention expect.
    save_tiny_base(request.param, folder / "base", head_dim=16)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower(image_size=32), lora_rank=4)
    change_adapter(model)
    for block in model.multimodal_language_model.modules():
        if hasattr(block, "modules_to_save"):
            for name, own in block.modules_to_save["default"].named_parameters():
                if name.endswith(KEPT) or request.param == "gemma3_text" and name == "post_attention_layernorm.weight":
                    own.data.copy_(block.original_module.get_parameter(name))
    texts = {"image_prefix": IMAGE_PREFIX, "image_suffix": IMAGE_SUFFIX}
    processor = processor_for(model.config, AutoTokenizer.from_pretrained(folder / "base"), **texts)
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
    card = (pair / "gguf/README.md").read_text()
    command = card.split("```bash\nllama-server -m base.gguf ")[1].split("```")[0].replace("\\\n", "")
    options = [str(pair / "gguf" / word) if ".gguf" in word else word for word in command.split()]
    with serving(pair / "base.gguf", *options) as address:
        yield address


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
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": PROMPTS[1]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    embeds = model.embed_request(inputs["input_ids"], inputs["pixel_values"])
    found = next_tokens(server, image_prompt(server, processor, PROMPTS[1], images), MULTIMODAL_VIEW)
    assert largest_error(found, model.multimodal_language_model, inputs_embeds=embeds) < LARGEST_ERROR
    without = model.embed_request(inputs["input_ids"], torch.zeros_like(inputs["pixel_values"]))
    assert largest_error(found, model.multimodal_language_model, inputs_embeds=without) > 2 * LARGEST_ERROR


def test_a_text_that_holds_the_servers_marker_is_refused(server, processor):
    marker = post(server, "/props")["media_marker"]
    with pytest.raises(ValueError, match="marks an image in llama.cpp"):
        image_prompt(server, processor, f"What is {marker}?", [drawn(32, 32, "7")])
