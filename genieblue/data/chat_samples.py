"""A chat sample: parses `messages`, LLaVA's and ShareGPT's `conversations`, and refuses what would lose meaning."""

from dataclasses import dataclass
from itertools import repeat
from typing import Any

from genieblue.data.image_folders import ImageFolders
from genieblue.data.sample_keys import check_unread_keys, is_missing, shortened
from modeling_genieblue.chat_messages_genieblue import IMAGE_SOURCES, image_sources, with_string_contents

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
IMAGE_KEYS = ("images", "image")
SAMPLE_KEYS = frozenset(("messages", "conversations", "system", "system_prompt", *IMAGE_KEYS))
IN_A_COLUMN = object()  # images that exist but are not decoded yet
TURN_KEYS = frozenset(("role", "from", "content", "value"))
IMAGE_PART_KEYS = ("type", "image_url", "index", *IMAGE_SOURCES)
# Other names for keys of images that are read already.
IMAGE_NAMES = frozenset(("image_url", "image_urls", "image_path", "image_name", "image_file", "file_name"))
IMAGE_MARK = "\0"  # in place of an image where texts are compared; a placeholder may be text
PLACEHOLDER = "<image>"  # in data files, whatever the processor's placeholder is
BAD_SAMPLE = (ValueError, OSError)


@dataclass(frozen=True)
class ChatSample:
    """One conversation that ends with an answer.

    Attributes:
        messages: `{"role", "content"}`; the content is a string, or a list of `{"type": "text", "text"}` and
            `{"type": "image"}`, as in the sample.
        images: one per image part, in order: a path, a PIL image, an array or the bytes of a file.
        where: `file:line` or the sample's number, for error messages.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    where: str


def parse_chat(raw: Any, where: str, image_folders: ImageFolders | None) -> ChatSample:
    """Parses a sample in either format without opening its images; `ValueError` for a bad one.

    `image_folders` must contain all images that are paths; with `None`, there may be none.
    """
    folders = image_folders or ImageFolders()
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the sample is {shortened(raw)}, expected an object with messages.")
    turns = _either(raw, ("messages", "conversations"), where)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(
            f"{where}: expected a list of turns as `messages` or `conversations`, found the keys {sorted(raw)}."
        )
    given = _either(raw, IMAGE_KEYS, where)
    is_list = isinstance(given, (list, tuple))
    has_placeholders = is_missing(raw.get("messages")) or not is_missing(given) or is_list and len(given) > 0
    messages = [
        _parse_turn(turn, has_placeholders, f"{where}, turn {index}") for index, turn in enumerate(turns, start=1)
    ]
    messages = _with_system(messages, _either(raw, ("system", "system_prompt"), where), where)
    _check_turns(messages, where)
    missing = sum(source is None for source in image_sources(messages))
    if given is IN_A_COLUMN:
        given = [b""] * missing
    elif is_missing(given) and not (is_list and missing):  # a list with nothing in it lacks what a placeholder shows
        given = []
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    images = _images_of_parts(messages, given, where)
    read = SAMPLE_KEYS | (IMAGE_NAMES if images else frozenset())
    check_unread_keys(raw, read, where, texts=texts_of(messages))
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
    return ChatSample(messages, [folders.resolve(image, where) for image in images], where)


def _either(found: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """The value of whichever of two keys is set; `ValueError` if both are set and differ."""
    given = [found[key] for key in keys if not is_missing(found.get(key))]
    if len(given) > 1 and given[0] != given[1] and [given[1]] != given[0]:
        raise ValueError(f"{where}: {keys[0]!r} and {keys[1]!r} are both given and differ; expected one of them.")
    return given[0] if given else next((found[key] for key in keys if found.get(key) is not None), None)


def _with_system(messages: list[dict[str, Any]], system: Any, where: str) -> list[dict[str, Any]]:
    """The messages, preceded by the system message that ShareGPT stores separately."""
    if is_missing(system):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"{where}: `system` is {shortened(system)}, expected a string.")
    if messages[0]["role"] == "system":
        if "".join(texts_of(messages[:1])).strip() != system.strip():
            raise ValueError(f"{where}: `system` differs from the system message; expected one of them.")
        return messages
    return [{"role": "system", "content": _encodable(system, where)}, *messages]


def _images_of_parts(messages: list[dict[str, Any]], given: list[Any], where: str) -> list[Any]:
    """The image of each image part in order; parts without their own image take the next `given` one."""
    for message in messages:
        if message["role"] != "user" and image_sources([message]):
            raise ValueError(
                f"{where}: an image in a turn of the {message['role']}; expected images only in user turns."
            )
    sources = image_sources(messages)
    missing = sum(source is None for source in sources)
    if missing != len(given):
        raise ValueError(
            f"{where}: {missing} placeholders ({PLACEHOLDER}, or an image part without an image) for {len(given)} "
            f"images; expected one for each. To use {PLACEHOLDER} as literal text, write the text as a part: "
            '{"type": "text", "text": ...}.'
        )
    remaining = iter(given)
    return [next(remaining) if source is None else source for source in sources]


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of messages: string contents and text parts."""
    texts: list[str] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return texts


def written_alike(messages: list[dict[str, Any]]) -> list[list[str]]:
    """Role and text of each message, the same for a string and for parts that say it, whatever the white space."""
    strings = with_string_contents(messages, repeat(IMAGE_MARK))
    return [[message["role"], " ".join(message["content"].split())] for message in strings]


def _parse_turn(turn: Any, has_placeholders: bool, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {shortened(turn)}, expected an object.")
    role, content = _either(turn, ("role", "from"), where), _either(turn, ("content", "value"), where)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}: the role is {shortened(role)}, expected one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        text = _encodable(content, where)
        parsed = _split_placeholders(text) if has_placeholders and ROLES[role] == "user" else text
    elif isinstance(content, (list, tuple)):
        parsed = [_parse_part(part, where) for part in content]
    else:
        raise ValueError(f"{where}: the content is {shortened(content)}, expected a string or a list of parts.")
    message = {"role": ROLES[role], "content": parsed}
    check_unread_keys(turn, TURN_KEYS, where, texts=texts_of([message]), strict=True)
    return message


def _parse_part(part: Any, where: str) -> dict[str, Any]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        check_unread_keys(part, ("type", "text"), where, strict=True)
        return {"type": "text", "text": _encodable(part["text"], where)}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'{where}: a part is {shortened(part)}, expected {{"type": "text", "text": ...}} or '
            '{"type": "image", "image": ...}.'
        )
    check_unread_keys(part, IMAGE_PART_KEYS, where, strict=True)
    if isinstance(part.get("image_url"), dict):
        check_unread_keys(part["image_url"], ("url",), where, strict=True)
    return {"type": kind} | {key: part[key] for key in IMAGE_PART_KEYS if not is_missing(part.get(key))}


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text contains an unpaired surrogate ({error}); write it as UTF-8.") from error
    return text


def _split_placeholders(text: str) -> str | list[dict[str, Any]]:
    """`"<image>\\nWhat is it?"` → an image part and a text part; the processor puts the newline between them."""
    if PLACEHOLDER not in text:
        return text
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_turns(messages: list[dict[str, Any]], where: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if turns != expected or not turns or turns[-1] != "assistant":
        raise ValueError(
            f"{where}: the roles are {', '.join(roles)}; expected user and assistant in turn, ending with the "
            "assistant, after at most one system message."
        )
    if not any(text.strip() for text in texts_of([message for message in messages if message["role"] == "assistant"])):
        raise ValueError(f"{where}: all answers are empty; expected text to learn.")
