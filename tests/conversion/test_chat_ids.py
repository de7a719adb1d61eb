"""Prompt, answer and stop token are the same ids in training and at inference, whatever the template and tokenizer."""

import numpy as np
import pytest
from tiny_processor import KINDS, make_processor, make_tokenizer, picture
from transformers import AddedToken, GenerationConfig

from conversion.chat_ids import IGNORED, NO_STOP_TOKEN, answer_text, chat_rows, stop_token_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "What is in this picture?"


def chatml_processor(kind: str = "byte_level", template: str = CHATML, **settings):
    """A ChatML template on a base whose generation stops at `</s>` only."""
    tokenizer = make_tokenizer(kind, chat_template=template, **settings)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    )
    return make_processor(tokenizer)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def inference_ids(processor, messages) -> list[int]:
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return np.ravel(ids).tolist()


def taught(row) -> list[tuple[list[int], list[int]]]:
    """(ids before it, ids) of each answer of a row."""
    found = []
    for index, label in enumerate(row.labels):
        if label == IGNORED:
            continue
        assert label == row.input_ids[index]
        if row.labels[index - 1] == IGNORED:
            found.append((row.input_ids[:index], []))
        found[-1][1].append(label)
    return found


ANSWERS = {
    "a word": "yes",
    "a line break first": "\nyes",
    "line breaks first": "\n\n yes",
    "a space first": " yes",
    "spaces at the end": "yes  ",
    "a line break last": "yes\n",
    "nothing": "",
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_lies_behind_its_prompt_at_inference_and_reads_as_given(kind, answer):
    processor = chatml_processor(kind)
    text, eos = ANSWERS[answer], processor.tokenizer.eos_token_id
    chat = [user(QUESTION), assistant(text), user("1 2 3"), assistant("4")]
    found = [pair for row in chat_rows(processor, chat, [], [eos]) for pair in taught(row)]
    assert [before for before, _ in found] == [inference_ids(processor, chat[:1]), inference_ids(processor, chat[:3])]
    for (before, ids), written in zip(found, (text, "4"), strict=True):
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids[-2:] == [end, eos]
        prompt, whole = (processor.tokenizer.decode(part) for part in (before, before + ids))
        assert whole == f"{prompt}{written}<|im_end|></s>"


def test_the_template_s_own_stop_token_is_the_last_one_and_the_chat_is_one_row():
    processor = chatml_processor()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [user(QUESTION), assistant("yes"), user("1 2 3"), assistant("4")]
    (row,) = chat_rows(processor, chat, [], [processor.tokenizer.eos_token_id, end])
    assert [ids[-1] for _, ids in taught(row)] == [end, end]
    assert all(ids.count(end) == 1 for _, ids in taught(row))


def test_rows_with_images_are_those_of_the_processor():
    processor = chatml_processor()
    image = {"type": "image", "image": picture(2, 1)}
    chat = [user([image, {"type": "text", "text": QUESTION}]), assistant("\nyes")]
    (row,) = chat_rows(processor, chat, [3], [2])
    ((before, _),) = taught(row)
    assert before == inference_ids(processor, chat[:1])


def test_a_list_of_text_parts_is_written_as_at_inference():
    reads_parts = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    processor = chatml_processor(template=reads_parts)
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "2"}]
    (row,) = chat_rows(processor, [user(parts), assistant("yes")], [], [2])
    assert taught(row)[0][0] == inference_ids(processor, [user(parts)])


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
def test_tokens_that_a_tokenizer_adds_by_itself_are_in_no_row(flag):
    processor = chatml_processor("metaspace_first", **{flag: True})
    (row,) = chat_rows(processor, [user(QUESTION), assistant("yes")], [], [2])
    assert processor.tokenizer.bos_token_id not in row.input_ids and row.input_ids.count(2) == 1


REFUSED = {
    "drops thoughts": (
        CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
        "<think>red</think>yes",
        "drops or rewrites",
    ),
    "cuts": (CHATML.replace("m['content']", "m['content'][:5]"), "seven words", "not prefix-stable|drops"),
    "stops within": (CHATML, "the token </s> ends it", "'</s>', at which generation stops"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_that_would_not_be_generated_as_given_is_refused(name):
    template, answer, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        chat_rows(chatml_processor(template=template), [user(QUESTION), assistant(answer)], [], [2])


def test_generation_that_never_stops_is_refused():
    with pytest.raises(ValueError) as error:
        chat_rows(chatml_processor(), [user(QUESTION), assistant("yes")], [], [])
    assert str(error.value) == NO_STOP_TOKEN


def test_stop_tokens_are_read_in_every_form():
    assert stop_token_ids(GenerationConfig()) == ()
    assert stop_token_ids(GenerationConfig(eos_token_id=7)) == (7,)
    assert stop_token_ids(GenerationConfig(eos_token_id=[7, 8])) == (7, 8)


FRAMES = {
    "nothing around": CHATML,
    "a thought before": CHATML.replace("{{ m['content'] }}", "{% if m['role'] == 'assistant' and loop.last %}"
                                       "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"),
    "a control token before": "{% for m in messages %}<|assistant|>{{ m['role'] }}\n{{ m['content'] }}</s>"
                              "{% endfor %}",
    "words around": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ##\n{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_what_the_template_writes_around_an_answer_is_no_part_of_it_when_the_conversation_goes_on(name):
    processor = chatml_processor(template=FRAMES[name])
    chat = [user(QUESTION), assistant("yes or no"), user("1 2 3"), assistant("4")]
    ((_, generated), *_), *_ = [taught(row) for row in chat_rows(processor, chat, [], [2])]
    assert answer_text(processor, chat[:1], generated) == "yes or no"
