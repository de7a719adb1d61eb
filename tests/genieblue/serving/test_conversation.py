"""A conversation: answers equal those of `generate` by hand, and keeping a cache changes nothing but the time."""

import functools

import pytest
import torch
from PIL import Image
from tiny_genieblue import tiny_genieblue
from tiny_models import FAMILIES_WITH_BOS, tiny_base, tiny_tokenizer
from transformers import CompileConfig

from genieblue.serving import conversation
from genieblue.serving.conversation import Chat
from modeling_genieblue import GenieBlueProcessor

SHORT = {"max_new_tokens": 6}


def make_chat(family: str = "llama", chat_template: bool = True) -> Chat:
    model = tiny_genieblue(family)
    processor = GenieBlueProcessor.from_base(
        tiny_tokenizer(chat_template, add_bos=family in FAMILIES_WITH_BOS),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        tile_size=24,
        max_tiles=4,
    )
    return Chat(model, processor)


@pytest.fixture
def chat() -> Chat:
    return make_chat()


def picture(seed: int = 0, width: int = 48) -> Image.Image:
    pixels = torch.randint(0, 256, (24, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def lengths_read(module: torch.nn.Module) -> list[int]:
    """Grows by the number of tokens of each pass of a view; a turn reads all that it generates but the last one."""
    lengths: list[int] = []

    def note(_module, args, kwargs):
        given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        lengths.append(next(value.shape[1] for value in given if value is not None))

    module.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


def tokens_to_read(first: dict, second: dict) -> int:
    """What the second turn has to read if all of the first one that was ever read is cached."""
    return second["prompt_tokens"] + second["generated_tokens"] - first["prompt_tokens"] - first["generated_tokens"]


def test_a_text_answer_is_the_bases_own(chat):
    result = chat.ask("Which tree is it?", **SHORT)
    base, tokenizer = tiny_base("llama"), tiny_tokenizer(add_bos=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which tree is it?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = base.generate(**inputs, do_sample=False, **SHORT)[0, inputs["input_ids"].shape[1] :]
    assert result == {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "view": "text",
        "prompt_tokens": inputs["input_ids"].shape[1],
        "generated_tokens": len(ids),
    }


def test_an_answer_about_images_is_that_of_generate(chat):
    images = [picture(0), picture(1, width=24)]
    result = chat.ask("Which is it?", images, **SHORT)
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Which is it?"}]
    inputs = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = chat.model.generate(**inputs, do_sample=False, **SHORT)[0, inputs["input_ids"].shape[1] :]
    assert result["text"] == chat.processor.decode(ids, skip_special_tokens=True)
    assert (result["view"], result["prompt_tokens"]) == ("multimodal", inputs["input_ids"].shape[1])


TURNS = [("What is it?", 0), ("Is it odd?", 0), ("And this?", 1), ("Then?", 0), ("These two?", 2), ("Why?", 0)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-sliding", "gemma3_text", "bluelm"])
def test_keeping_the_cache_changes_no_answer(family):
    kept, fresh = make_chat(family), make_chat(family)
    for number, (prompt, num_images) in enumerate(TURNS):
        images = [picture(10 * number + index) for index in range(num_images)]
        fresh.messages = kept.messages
        fresh._cache = None
        assert kept.ask(prompt, images, **SHORT) == fresh.ask(prompt, images, **SHORT)


def test_a_text_turn_reads_only_what_is_new(chat):
    first = chat.ask("What is it?", **SHORT)
    lengths = lengths_read(chat.model.language_model)
    second = chat.ask("Is it odd?", **SHORT)
    assert sum(lengths) == tokens_to_read(first, second)


def test_a_turn_after_an_image_reads_only_what_is_new(chat):
    first = chat.ask("What is it?", [picture()], **SHORT)
    lengths, tiles = lengths_read(chat.model.multimodal_language_model), []
    chat.model.vision_tower.register_forward_pre_hook(lambda _module, args: tiles.append(len(args[0])))
    second = chat.ask("And it?", **SHORT)
    assert sum(lengths) == tokens_to_read(first, second)
    assert tiles == []
    chat.ask("And this?", [picture(1)], **SHORT)
    assert tiles == [3]  # a thumbnail and two tiles of the new image alone


def test_the_first_image_prefills_the_conversation_in_the_multimodal_view(chat):
    assert chat.ask("What is it?", **SHORT)["view"] == "text"
    lengths = lengths_read(chat.model.multimodal_language_model)
    second = chat.ask("And this?", [picture()], **SHORT)
    assert second["view"] == "multimodal"
    assert max(lengths) == second["prompt_tokens"]
    assert chat.ask("Why?", **SHORT)["view"] == "multimodal"


def test_a_placeholder_in_a_question_or_an_answer_is_text_in_every_turn(chat):
    chat.ask("What does <image> do?", **SHORT)
    chat.messages[-1]["content"] = "<image> is a tag."
    result = chat.ask("And this one?", [picture()], **SHORT)
    inputs = chat.processor.apply_chat_template(
        chat.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert result["view"] == "multimodal" and result["prompt_tokens"] == len(inputs["input_ids"][0])
    assert chat.processor.decode(inputs["input_ids"][0]).count("<image>") == 3


def test_a_view_that_is_asked_for_is_used(chat):
    text = chat.ask("What is it?", **SHORT)
    chat.reset()
    multimodal = chat.ask("What is it?", view="multimodal", **SHORT)
    assert multimodal["view"] == "multimodal" and multimodal["text"] != text["text"]
    assert chat.ask("Why?", **SHORT)["view"] == "text"
    with pytest.raises(ValueError, match="cannot process image tokens"):
        chat.ask("And this?", [picture()], view="text", **SHORT)


@pytest.mark.parametrize("images", [0, 1])
def test_pieces_that_are_streamed_join_to_the_answer(chat, images):
    pieces: list[str] = []
    result = chat.ask("What is it?", [picture()] * images, max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces) == result["text"]


@pytest.mark.parametrize("generated", ["assistant: yes ##", "assistant: yes ## or", "yes #", "assist"])
def test_what_the_template_writes_around_an_answer_is_not_streamed(chat, monkeypatch, generated):
    chat.processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ##\n{% endfor %}"
    )
    pieces: list[str] = []

    def answer(ids, pixel_values, *, streamer, **_settings):
        new = chat.processor.tokenizer(generated, add_special_tokens=False)["input_ids"]
        streamer.put(torch.tensor([ids]))
        for token in new:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return new

    monkeypatch.setattr(chat, "_answer", answer)
    result = chat.ask("What is it?", [picture()], on_text=pieces.append)
    assert "".join(pieces) == result["text"] == generated.removeprefix("assistant: ").removesuffix(" ##")


def test_a_template_that_rewrites_old_answers_gets_a_right_answer(chat):
    other = make_chat()
    template = (
        "{% for message in messages %}{% set text = message['content'] %}"
        "{% if message['role'] == 'assistant' %}{% set text = text[:2] %}{% endif %}"
        "{{ '<|' + message['role'] + '|>' + text + eos_token }}{% endfor %}<|assistant|>"
    )
    for one in (chat, other):
        one.processor.tokenizer.chat_template = template
    for prompt, num_images in TURNS:
        images = [picture(index) for index in range(num_images)]
        other.messages, other._cache = chat.messages, None
        assert chat.ask(prompt, images, **SHORT) == other.ask(prompt, images, **SHORT)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("images", [0, 1])
def test_an_interrupted_turn_leaves_the_conversation_as_it_was(chat, images):
    def interrupt(_piece):
        raise Interrupted

    other = make_chat()
    for one in (chat, other):
        one.ask("What is it?", **SHORT)
    with pytest.raises(Interrupted):
        chat.ask("Tell me more.", [picture()] * images, max_new_tokens=50, on_text=interrupt)
    assert chat.messages == other.messages
    assert chat.ask("Is it odd?", **SHORT) == other.ask("Is it odd?", **SHORT)


def test_a_bad_image_leaves_the_conversation_as_it_was(chat, tmp_path):
    chat.ask("What is it?", **SHORT)
    before = list(chat.messages)
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(OSError, match="notes.png cannot be read as an image"):
        chat.ask("And this?", [tmp_path / "notes.png"], **SHORT)
    assert chat.messages == before


def test_a_base_without_chat_template_completes_each_prompt_by_itself():
    chat = make_chat(chat_template=False)
    assert chat.completes_only
    base, tokenizer = tiny_base("llama"), tiny_tokenizer(chat_template=False, add_bos=True)
    for _ in range(2):
        inputs = tokenizer("A tall tree stands", return_tensors="pt")
        ids = base.generate(inputs["input_ids"], do_sample=False, **SHORT)[0, inputs["input_ids"].shape[1] :]
        result = chat.ask("A tall tree stands", **SHORT)
        assert result["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert result["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_a_base_without_chat_template_completes_after_an_image():
    chat = make_chat(chat_template=False)
    result = chat.ask("The number is", [picture()], **SHORT)
    inputs = chat.processor("<image>\nThe number is", images=[picture()], return_tensors="pt")
    literal = chat.ask("<image> is", [picture()], **SHORT)["prompt_tokens"] - inputs["input_ids"].shape[1]
    assert literal == len(chat.processor.tokenizer("<image> is")[0]) - len(
        chat.processor.tokenizer("The number is")[0]
    )
    ids = chat.model.generate(**inputs, do_sample=False, **SHORT)[0, inputs["input_ids"].shape[1] :]
    assert result["text"] == chat.processor.decode(ids, skip_special_tokens=True)
    assert result["view"] == "multimodal"


def test_draws_depend_on_the_seed_alone(chat):
    def draw(seed: int) -> str:
        chat.reset()
        torch.manual_seed(seed)
        return chat.ask("What is it?", max_new_tokens=12, temperature=1.5)["text"]

    assert draw(1) == draw(1) != draw(2)


def test_a_conversation_longer_than_the_base_was_made_for_is_warned_of(chat, caplog):
    chat.ask("What is it?", max_new_tokens=3)
    assert not caplog.records
    chat.model.config.text_config.max_position_embeddings = 20
    chat.ask("What is it?", max_new_tokens=3)
    assert "the base supports only 20" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_settings_out_of_range_are_refused(chat, settings):
    with pytest.raises(ValueError, match="^Got .*: expected "):
        chat.ask("What is it?", **settings)


def test_an_empty_prompt_is_refused(chat):
    with pytest.raises(ValueError, match="prompt is empty"):
        chat.ask("  \n")


def test_compiled_decoding_gives_the_same_conversation(chat, monkeypatch):
    """Over turns, a change of the view, and a conversation that outgrows its room."""
    graphs = []

    def backend(graph, _inputs, **_options):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(conversation, "CompileConfig", functools.partial(CompileConfig, backend=backend))
    monkeypatch.setattr(conversation, "SMALLEST_CACHE", 64)
    compiled = Chat(chat.model, chat.processor, compile=True)
    turns = [("Which tree?", []), ("And now?", []), ("What is it?", [picture()]), ("Are you sure?", [])]
    for prompt, images in turns:
        assert compiled.ask(prompt, images, **SHORT) == chat.ask(prompt, images, **SHORT)
    assert graphs
