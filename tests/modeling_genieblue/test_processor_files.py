"""The processor as others use it: saved and loaded, as code from a repository, in transformers' pipeline."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from tiny_processor import (
    CONVERSATIONS,
    CORPUS,
    IMAGE_ID,
    KINDS,
    SEQ,
    SIZE,
    TEMPLATE,
    make_processor,
    make_tokenizer,
    picture,
    snapshot,
)
from transformers import AutoProcessor, AutoTokenizer
from transformers.pipelines.image_text_to_text import Chat, ImageTextToTextPipeline, ReturnType

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor
from modeling_genieblue.processing_genieblue import GenieBlueProcessor


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


# Saving


def text_results(processor) -> list:
    chat = {"tokenize": True, "return_dict": True}
    return [
        [dict(processor.tokenizer(text)) for text in (*CORPUS, "a literal <image> here")],
        [dict(processor.apply_chat_template(chats, **chat)) for chats in CONVERSATIONS.values()],
        processor.apply_chat_template(CONVERSATIONS["turns"], add_generation_prompt=True),
    ]


@pytest.mark.parametrize("own_template", [False, True])
def test_saving_and_loading_keeps_everything(tokenizer, tmp_path, own_template):
    if own_template:
        tokenizer.chat_template = None
    saved = GenieBlueProcessor(
        GenieBlueImageProcessor(tile_size=SIZE, max_tiles=4, relaxed_alpha=0.3),
        tokenizer,
        chat_template=TEMPLATE if own_template else None,
        image_token="<|picture|>",
        image_token_id=IMAGE_ID,
        image_seq_length=SEQ,
    )
    before = snapshot(tokenizer)
    saved.save_pretrained(tmp_path)
    loaded = GenieBlueProcessor.from_pretrained(tmp_path)
    assert snapshot(tokenizer) == before
    assert text_results(loaded) == text_results(saved)
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.chat_template == saved.chat_template == TEMPLATE
    assert (loaded.image_token, loaded.image_token_id, loaded.image_seq_length) == ("<|picture|>", IMAGE_ID, SEQ)
    assert loaded.image_processor._settings() == saved.image_processor._settings()
    assert loaded.model_input_names == saved.model_input_names
    assert {"pixel_values", "num_tiles", "input_ids"} <= set(loaded.model_input_names)
    request = {"text": "<|picture|> yes", "images": picture(2)}
    assert loaded(**request)["input_ids"] == saved(**request)["input_ids"]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_saved_tokenizer_is_the_bases(tokenizer, tmp_path):
    make_processor(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "base")
    base = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    ours = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert ours.pop("processor_class") == "GenieBlueProcessor"
    assert ours == base
    kept = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert kept == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("yes <image>") == tokenizer("yes <image>")


def test_a_template_given_at_loading_is_used_by_a_base_without_one(tmp_path):
    make_processor(make_tokenizer(chat_template=None), chat_template=TEMPLATE).save_pretrained(tmp_path)
    loaded = GenieBlueProcessor.from_pretrained(tmp_path, chat_template="{{ messages[0]['content'] }}!")
    assert loaded.apply_chat_template(CONVERSATIONS["question"]) == "What is in this picture?!"


REMOTE_SCRIPT = """
import json, sys
sys.modules["modeling_genieblue"] = None  # it cannot be imported, installed or not
from PIL import Image
from transformers import AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
picture = Image.new("RGB", (16, 8))
output = processor(text=["<image> yes", "no"], images=[[picture], []], padding=False)
processor.save_pretrained(folder + "-again")
again = AutoProcessor.from_pretrained(folder + "-again", trust_remote_code=True)
assert again(text="<image>", images=picture)["num_tiles"].tolist() == [3]
print(json.dumps([type(processor).__module__.split(".")[0], output["input_ids"], list(output["pixel_values"].shape)]))
"""


def test_auto_processor_loads_the_saved_code_without_the_package(tmp_path):
    processor = make_processor(make_tokenizer("metaspace_first"))
    processor.save_pretrained(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, str(tmp_path / "model")], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    module, ids, shape = json.loads(ran.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert ids == processor(text=["<image> yes", "no"], images=[[picture(2)], []], padding=False)["input_ids"]
    assert shape == [3, 3, SIZE, SIZE]


def test_auto_processor_uses_the_package_where_it_is_installed(tmp_path):
    import modeling_genieblue  # noqa: F401  registers the classes

    make_processor().save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is GenieBlueProcessor


# transformers' pipeline


class RecordedModel:
    """Stands in for a model: remembers its inputs and answers with the same tokens to all."""

    dtype = torch.bfloat16

    def __init__(self, answer):
        self.answer, self.inputs = answer, None

    def generate(self, **inputs):
        self.inputs = inputs
        return torch.cat([inputs["input_ids"], self.answer.expand(len(inputs["input_ids"]), -1)], dim=1)


@pytest.mark.parametrize("with_image", [False, True])
def test_pipeline_conventions(with_image):
    processor = make_processor()
    # The constructor wants a real model; the three stages that a call runs do not.
    pipeline = object.__new__(ImageTextToTextPipeline)
    pipeline.processor, pipeline.tokenizer = processor, processor.tokenizer
    pipeline.model = RecordedModel(processor.tokenizer("yes", return_tensors="pt")["input_ids"])
    pipeline._prepare_generate_kwargs = lambda generate_kwargs, **_: generate_kwargs
    content = [{"type": "text", "text": "no?"}]
    content = [{"type": "image", "image": picture(2)}, *content] if with_image else content
    inputs = pipeline.preprocess(Chat([{"role": "user", "content": content}]))
    outputs = pipeline._forward(inputs)
    assert ("pixel_values" in pipeline.model.inputs) == with_image
    if with_image:
        assert pipeline.model.inputs["pixel_values"].dtype == torch.bfloat16
    (record,) = pipeline.postprocess(outputs, return_type=ReturnType.NEW_TEXT)
    assert record["generated_text"] == "yes"


def test_a_processor_logs_nothing_in_ordinary_use(caplog):
    with caplog.at_level(logging.WARNING):
        make_processor()(text="<image> yes", images=picture(4, 4), return_tensors="pt")
    assert not caplog.records
