"""Messages with image parts: where their images come from, and the strings that a base's chat template can format."""

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

IMAGE_SOURCES = ("image", "url", "path", "base64")


def image_sources(conversation: list[dict[str, Any]]) -> list[Any]:
    """Return the image of each image part in order, None for a part whose image is passed apart from it."""
    contents = [message.get("content") for message in conversation]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return [_image_source(part) for part in parts if _part_type(part) == "image"]


def text_for_template(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], template_kwargs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a text-only conversation, with strings for lists of text parts unless the template reads such lists."""
    if not any(isinstance(message.get("content"), (list, tuple)) for message in conversation):
        return conversation
    as_strings = with_string_contents(conversation, image_token="")
    template = {name: template_kwargs.get(name) for name in ("chat_template", "tools")}
    renderings = []
    for content in ("text", [{"type": "text", "text": "text"}]):
        try:
            probe = [{"role": "user", "content": content}]
            renderings.append(tokenizer.apply_chat_template(probe, tokenize=False, **template))
        except Exception:  # A template may fail in any way on content that it was not written for.
            return as_strings
    return conversation if renderings[0] == renderings[1] else as_strings


def with_string_contents(conversation: list[dict[str, Any]], image_token: str) -> list[dict[str, Any]]:
    """Return the conversation with text parts joined and image parts as `image_token`, a newline before the next."""
    messages = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            last = len(content) - 1
            pieces = [
                _text(part) if _part_type(part) == "text" else image_token + ("\n" if position < last else "")
                for position, part in enumerate(content)
            ]
            message = {**message, "content": "".join(pieces)}
        messages.append(message)
    return messages


def _text(part: str | dict[str, Any]) -> str:
    return part if isinstance(part, str) else part["text"]


def _part_type(part: str | dict[str, Any]) -> str:
    kind = "text" if isinstance(part, str) else part.get("type")
    if kind in ("image", "image_url"):
        return "image"
    if kind != "text" or not isinstance(part, str) and not isinstance(part.get("text"), str):
        raise ValueError(
            f"A message has a part of type {kind!r} with {sorted(part)}; expected "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    return "text"


def _image_source(part: dict[str, Any]) -> Any:
    address = part.get("image_url")
    if address is not None:  # The form of the OpenAI API.
        return address["url"] if isinstance(address, dict) else address
    # A key without a value is what a table with one column per key makes of a missing one.
    source = next((name for name in IMAGE_SOURCES if part.get(name) is not None), None)
    if source == "base64" and not part["base64"].startswith("data:"):
        return f"data:image/any;base64,{part['base64']}"
    return None if source is None else part[source]
