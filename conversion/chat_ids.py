"""Token ids of a chat, identical in training and inference: prompts, answers, and the stop token of each answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling_genieblue.chat_messages_genieblue import image_sources, with_string_contents
from modeling_genieblue.loss_genieblue import IGNORED

PROBE = "Seven is the answer"  # a sample answer, to find out what a template writes around answers
NO_STOP_TOKEN = (
    "Generation with this base never stops, because `eos_token_id` is not set: set it to the token that ends a turn, "
    "in `model.generation_config` or in generation_config.json: the base's before `init`, the GenieBlue's after it."
)


@dataclass
class ChatRow:
    """One training row: ids, and labels that are `IGNORED` outside the answers."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def stop_token_ids(generation_config: Any) -> tuple[int, ...]:
    """The ids that stop `generate`; empty if there are none."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        return ()
    eos = eos.tolist() if hasattr(eos, "tolist") else eos
    return tuple(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))


def chat_rows(
    processor: Any, messages: list[dict[str, Any]], num_tiles: Sequence[int], stop_ids: Sequence[int]
) -> list[ChatRow]:
    """The training rows for the answers of a chat, whose images have `num_tiles` tiles each.

    Each answer follows exactly the ids that its prompt has at inference, is tokenized as their continuation, and ends
    with one of `stop_ids`. Answers share a row as long as the row so far is a prefix of the next prompt. Otherwise,
    for example if a template drops the thoughts of earlier turns or does not write the stop token, each answer gets
    its own row.

    Raises `ValueError` for a template that changes the answer or whose prompt is not a prefix of the conversation, for
    an answer that contains a stop token, and if generation never stops.
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
    """Ids of the prompt for a chat's last message (an answer), and the ids that `generate` should add."""
    *turns, last = messages
    prompt = render(processor, turns, prompt=True)
    _, after = answer_frame(processor, turns)
    body = _body(render(processor, messages, prompt=False)[len(prompt) :], after)
    given = with_string_contents([last], iter(()))[0]["content"]
    if _squeezed(given) not in _squeezed(body):
        raise ValueError(
            f"the chat template drops or rewrites part of the answer: it writes {_shown(body)} for {_shown(given)}. "
            "Reword the answer, or use another `chat_template`."
        )
    prompt_ids = _prompt_ids(processor, turns, prompt, num_tiles)
    ids = _following(processor, num_tiles, prompt, prompt_ids, body)
    if early := [token for token in ids if token in stop_ids]:
        raise ValueError(
            f"the answer contains {processor.tokenizer.decode(early[:1])!r}, at which generation stops, so the rest "
            "would never be generated: reword the answer."
        )
    return prompt_ids, ids + _end_ids(processor, num_tiles, prompt + body, prompt_ids + ids, after, stop_ids)


def answer_frame(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The text that the chat template writes between a prompt and an answer to `messages`, and after the answer.

    Raises `ValueError` if the prompt is not a prefix of the conversation with the answer.
    """
    prompt = render(processor, messages, prompt=True)
    text = render(processor, [*messages, {"role": "assistant", "content": PROBE}], prompt=False)
    before, answer, after = text[len(prompt) :].partition(PROBE)
    if not text.startswith(prompt) or not answer:
        raise ValueError(
            "the chat template is not prefix-stable: the prompt for an answer (`add_generation_prompt=True`), which "
            f"ends in {prompt[-60:]!r}, is not a prefix of the conversation with that answer, so training would not "
            "match generation. Use another `chat_template`."
        )
    return before, after


def answer_text(processor: Any, messages: list[dict[str, Any]], generated_ids: list[int]) -> str:
    """The answer to `messages` in generated ids, without the text that the template writes around answers.

    The model generates that text too, and the template would add it again in the next turn.
    """
    before, after = decoded_frame(processor, messages)
    text = processor.tokenizer.decode(generated_ids, skip_special_tokens=True)
    return text.removeprefix(before).removesuffix(after)


def decoded_frame(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The text that the template writes before and after an answer, as it reads in the decoded answer."""
    try:
        before, after = answer_frame(processor, messages)
    except ValueError:  # training refuses such a template, so this model was made with another
        return "", ""
    return _as_generated(processor.tokenizer, before), _as_generated(processor.tokenizer, after.rstrip())


def _as_generated(tokenizer: Any, text: str) -> str:
    """A text of the template as it reads in a decoded answer: without special tokens."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def render(processor: Any, messages: list[dict[str, Any]], *, prompt: bool) -> str:
    """The chat as formatted by the processor; as a `prompt`, up to the start of the next answer."""
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def _prompt_ids(processor: Any, messages: list[dict[str, Any]], text: str, num_tiles: Sequence[int]) -> list[int]:
    if num_tiles:
        return processor.encode_with_images(text, num_tiles, add_special_tokens=False)
    (ids,) = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True)
    return list(ids)


def _body(completion: str, after: str) -> str:
    """The text to generate before the template's end of turn: the answer, and what the template writes before it."""
    if not completion.endswith(after):
        raise ValueError(
            f"the chat template ends this answer differently from others: it writes {_shown(completion)}, which "
            f"should end in {after!r}. Use another `chat_template`."
        )
    return completion.removesuffix(after)


def _end_ids(
    processor: Any, num_tiles: Sequence[int], text: str, ids: list[int], after: str, stop_ids: Sequence[int]
) -> list[int]:
    """Ids of the template's end of turn, up to and including a stop token, which is added if there is none.

    Templates often write a newline after it, which is never generated.
    """
    end = _following(processor, num_tiles, text, ids, after)
    for index, token in enumerate(end):
        if token in stop_ids:
            return end[: index + 1]
    own = processor.tokenizer.eos_token_id
    stop = own if own in stop_ids else stop_ids[0]
    return [*_following(processor, num_tiles, text, ids, after.rstrip()), stop]


def _following(processor: Any, num_tiles: Sequence[int], text: str, ids: list[int], piece: str) -> list[int]:
    """Ids of `piece` after a text with these `ids`: tokenized together, unless that changes the ids of the text.

    For example, a newline at the start of an answer may merge with one at the end of its prompt.
    """
    whole = processor.encode_with_images(text + piece, num_tiles, add_special_tokens=False)
    return whole[len(ids) :] if whole[: len(ids)] == ids else _apart(processor.tokenizer, piece)


def _apart(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in the middle of another: without the space that some tokenizers add at the start."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if encode("a a") == encode("a") * 2:  # the tokenizer adds such a space
        for anchor in ("\n", ":", "."):
            whole, start = encode(anchor + text), encode(anchor)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return encode(text)


def _squeezed(text: str) -> str:
    """A text without whitespace, which templates trim."""
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
