"""Token ids of a chat, the same in training as at inference: prompts, answers, and the token that ends each answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling_genieblue.chat_messages_genieblue import image_sources, with_string_contents

IGNORED = -100
PROBE = "Seven is the answer"  # stands for an answer when a template is asked what it writes around one
NO_STOP_TOKEN = (
    "Generation of this base stops at no token (`eos_token_id` of its generation_config.json is not set), so no "
    "answer would ever end: set `model.generation_config.eos_token_id` to the token that ends a turn, or name it in "
    "the base's generation_config.json."
)


@dataclass
class ChatRow:
    """One row of training: ids, and labels that are `IGNORED` outside of the answers."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def stop_token_ids(generation_config: Any) -> tuple[int, ...]:
    """The ids at which `generate` ends an answer; none if it never does."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        return ()
    eos = eos.tolist() if hasattr(eos, "tolist") else eos
    return tuple(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))


def chat_rows(
    processor: Any, messages: list[dict[str, Any]], num_tiles: Sequence[int], stop_ids: Sequence[int]
) -> list[ChatRow]:
    """The rows that teach the answers of a chat, whose images have `num_tiles` tiles each.

    Each answer lies behind the very ids that its prompt has at inference, is tokenized as what follows them, and ends
    with one of `stop_ids`. Answers share a row for as long as the prompt of the next one begins with the row so far;
    a template that writes earlier turns in another way (without their thoughts, say), or a stop token that is no part
    of it, makes a row of its own for each answer.

    Raises `ValueError` for a template that writes another text than the answer, or whose prompt is not how the
    conversation with the answer begins, for an answer in which generation would stop before its end, and if
    generation never stops.
    """
    if not stop_ids:
        raise ValueError(NO_STOP_TOKEN)
    rows: list[ChatRow] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        tiles = list(num_tiles)[: len(image_sources(messages[:index]))]
        prompt, answer = answer_ids(processor, messages[: index + 1], tiles, stop_ids)
        if not rows or prompt[: len(rows[-1].input_ids)] != rows[-1].input_ids:
            rows.append(ChatRow())
        row = rows[-1]
        row.labels += [IGNORED] * (len(prompt) - len(row.input_ids)) + answer
        row.input_ids = prompt + answer
    return rows


def answer_ids(
    processor: Any, messages: list[dict[str, Any]], num_tiles: Sequence[int], stop_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of the prompt of a chat's last message, an answer, and those that `generate` is to add to it."""
    *turns, last = messages
    prompt = render(processor, turns, prompt=True)
    _, after = answer_frame(processor, turns)
    body = _body(render(processor, messages, prompt=False)[len(prompt) :], after)
    given = with_string_contents([last], iter(()))[0]["content"]
    if _squeezed(given) not in _squeezed(body):
        raise ValueError(
            f"the chat template leaves out or rewrites a part of the answer: it writes {_shown(body)} for "
            f"{_shown(given)}, so something else would be trained than the sample says. Reword the answer, or use "
            "another `chat_template`."
        )
    prompt_ids = _prompt_ids(processor, turns, prompt, num_tiles)
    ids = _following(processor, num_tiles, prompt, prompt_ids, body)
    if early := [token for token in ids if token in stop_ids]:
        raise ValueError(
            f"the answer holds {processor.tokenizer.decode(early[:1])!r}, at which generation stops, so its rest "
            "would never be generated: reword the answer."
        )
    return prompt_ids, ids + _end_ids(processor, num_tiles, prompt + body, prompt_ids + ids, after, stop_ids)


def answer_frame(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """What the chat template writes between the prompt of an answer to `messages` and that answer, and behind it.

    Raises `ValueError` if the prompt is not how the conversation with the answer begins.
    """
    prompt = render(processor, messages, prompt=True)
    text = render(processor, [*messages, {"role": "assistant", "content": PROBE}], prompt=False)
    before, answer, after = text[len(prompt) :].partition(PROBE)
    if not text.startswith(prompt) or not answer:
        raise ValueError(
            "the chat template is not prefix-stable: the prompt of an answer (`add_generation_prompt=True`), which "
            f"ends in {prompt[-60:]!r}, is not how the conversation with that answer begins, so what would be trained "
            "is not what is generated. Use another `chat_template`."
        )
    return before, after


def answer_text(processor: Any, messages: list[dict[str, Any]], generated_ids: list[int]) -> str:
    """The answer to `messages` in generated ids, without what the template itself writes around an answer.

    A trained answer is generated with it. It would be written twice once the conversation goes on.
    """
    text = processor.tokenizer.decode(generated_ids, skip_special_tokens=True)
    try:
        before, after = answer_frame(processor, messages)
    except ValueError:  # no model can be trained with such a template: this one was made with another
        return text
    before, after = (_as_generated(processor.tokenizer, piece) for piece in (before, after.rstrip()))
    return text.removeprefix(before).removesuffix(after)


def _as_generated(tokenizer: Any, text: str) -> str:
    """A text of the template as it reads in a decoded answer: without special tokens."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def render(processor: Any, messages: list[dict[str, Any]], *, prompt: bool) -> str:
    """The text of a chat as the processor formats it, up to where an answer begins if it is to be a `prompt`."""
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def _prompt_ids(processor: Any, messages: list[dict[str, Any]], text: str, num_tiles: Sequence[int]) -> list[int]:
    if num_tiles:
        return processor.encode_with_images(text, num_tiles, add_special_tokens=False)
    return list(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))


def _body(completion: str, after: str) -> str:
    """What is to be generated up to the template's end: the answer, with what the template writes before it."""
    if not completion.endswith(after):
        raise ValueError(
            f"the chat template ends this answer otherwise than others: it writes {_shown(completion)}, which should "
            f"end in {after!r}. Use another `chat_template`."
        )
    return completion.removesuffix(after)


def _end_ids(
    processor: Any, num_tiles: Sequence[int], text: str, ids: list[int], after: str, stop_ids: Sequence[int]
) -> list[int]:
    """Ids of the template's end of a turn, up to the token at which generation stops; that token, if it has none.

    Templates go on with a newline behind it, which is never generated.
    """
    end = _following(processor, num_tiles, text, ids, after)
    for index, token in enumerate(end):
        if token in stop_ids:
            return end[: index + 1]
    own = processor.tokenizer.eos_token_id
    stop = own if own in stop_ids else stop_ids[0]
    return [*_following(processor, num_tiles, text, ids, after.rstrip()), stop]


def _following(processor: Any, num_tiles: Sequence[int], text: str, ids: list[int], piece: str) -> list[int]:
    """Ids of `piece` behind a text with these `ids`: in one go with it, unless that changes the ids of the text.

    A newline at the beginning of an answer, say, may become one token with that at the end of its prompt.
    """
    whole = processor.encode_with_images(text + piece, num_tiles, add_special_tokens=False)
    return whole[len(ids) :] if whole[: len(ids)] == ids else _apart(processor.tokenizer, piece)


def _apart(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as it follows another one: without the space that some tokenizers put before a beginning."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if encode("a a") == encode("a") * 2:  # the beginning got such a space
        for anchor in ("\n", ":", "."):
            whole, start = encode(anchor + text), encode(anchor)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return encode(text)


def _squeezed(text: str) -> str:
    """A text without white space, which templates trim."""
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


__all__ = ["IGNORED", "NO_STOP_TOKEN", "ChatRow", "answer_frame", "answer_text", "chat_rows", "stop_token_ids"]
