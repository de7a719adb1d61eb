"""Messages with image parts: finds their images and makes strings that a base's chat template can format."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .addresses_genieblue import shown

IMAGE_SOURCES = ("image", "url", "path", "base64")
IMAGE_KINDS = ("image", "image_url")
# Keys that are not allowed in a message or a text part, because they would be ignored there.
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "file", "files")
EXPECTED = '{"type": "text", "text": ...} or {"type": "image", "image": ...}'


def conversations_of(conversation: Any) -> tuple[list[Any], bool]:
    """Return conversations as lists of messages, and whether a batch of them was given; ValueError for a message."""
    if isinstance(conversation, dict):
        raise ValueError("The conversation is a dict; expected a list of messages, or a list of such lists.")
    is_batch = bool(conversation) and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    )
    return [getattr(chat, "messages", chat) for chat in (conversation if is_batch else [conversation])], is_batch


def image_sources(conversation: Iterable[dict[str, Any]]) -> list[Any]:
    """
    Return the image of each image part in order, None for a part whose image is passed separately.

    ValueError for other kinds of parts, and for images and other media in places where they would be ignored.
    """
    sources: list[Any] = []
    for message in conversation:
        if not isinstance(message, dict):
            raise ValueError(f"A message has type {type(message).__name__}; expected a dict with role and content.")
        _check_keys("A message", message, [key for key in MEDIA if message.get(key) is not None])
        content = message.get("content")
        if isinstance(content, dict) and content.get("type") in IMAGE_KINDS:
            raise ValueError(f"The content of a message is a single image part; expected a list of parts: {EXPECTED}.")
        for part in content if isinstance(content, (list, tuple)) else ():
            if _is_image(part):
                sources.append(_image_source(part, len(sources)))
    return sources


def text_for_template(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], template_kwargs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a text-only conversation; lists of text parts become strings unless the template supports lists."""
    if not any(isinstance(message.get("content"), (list, tuple)) for message in conversation):
        return conversation
    template: dict[str, Any] = {name: template_kwargs.get(name) for name in ("chat_template", "tools")}
    renderings = []
    for content in ("text", [{"type": "text", "text": "text"}]):
        try:
            probe = [{"role": "user", "content": content}]
            renderings.append(tokenizer.apply_chat_template(probe, tokenize=False, **template))
        except Exception:  # A template can fail in any way on unexpected content.
            return with_string_contents(conversation, iter(()))
    return conversation if renderings[0] == renderings[1] else with_string_contents(conversation, iter(()))


def with_string_contents(conversation: Iterable[dict[str, Any]], images: Iterator[str]) -> list[dict[str, Any]]:
    """Return the conversation with text parts joined and the next of `images` for each image part.

    A newline follows each image, unless it is the last part. ValueError for other keys in a text part.
    """
    messages = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            last = len(content) - 1
            pieces = [
                next(images) + ("\n" if position < last else "") if _is_image(part) else _text(part)
                for position, part in enumerate(content)
            ]
            message = {**message, "content": "".join(pieces)}
        messages.append(message)
    return messages


def _is_image(part: str | dict[str, Any]) -> bool:
    """Whether a part is an image rather than text; ValueError if it is neither."""
    if isinstance(part, str):
        return False
    if not isinstance(part, dict):
        raise ValueError(f"A part of a message has type {type(part).__name__}; expected a string, {EXPECTED}.")
    kind = part.get("type")
    if kind in IMAGE_KINDS:
        return True
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"A message has a part of type {shown(repr(kind))} with keys {sorted(part)}; expected {EXPECTED}."
        )
    _check_keys("A text part", part, [key for key in MEDIA if part.get(key) is not None])
    return False


def _text(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    _check_keys("A text part", part, [key for key in part if key not in ("type", "text") and part[key] is not None])
    return part["text"]


def _image_source(part: dict[str, Any], number: int) -> Any:
    """The image of image part `number`; a key without a value counts as missing, as in a table."""
    given = {key: value for key, value in part.items() if value is not None and key != "type"}
    if given.get("index") == number:  # its index among separately passed images
        del given["index"]
    _check_keys("An image part", part, [key for key in given if key not in ("image_url", *IMAGE_SOURCES)])
    if len(given) > 1:
        raise ValueError(f"An image part has {' and '.join(sorted(given))}; expected only one of them.")
    for key, source in given.items():
        if key == "image_url" and isinstance(source, dict):  # OpenAI's format
            source = source.get("url")
        if key in ("base64", "image_url") and not isinstance(source, str):
            raise ValueError(
                f"The {key} of an image part is not a string; expected base64 data or the URL of an image."
            )
        is_bare = key == "base64" and not str(source).startswith("data:")
        return f"data:image/any;base64,{source}" if is_bare else source
    return None


def _check_keys(what: str, holder: dict[str, Any], keys: list[Any]) -> None:
    if keys:
        lost = ", ".join(repr(shown(key)) for key in keys)
        raise ValueError(
            f"{what} with keys {sorted(map(shown, holder))} has {lost}, which would be lost; "
            f"expected parts of a message's content such as {EXPECTED}. Remove it, or move it into the text."
        )
