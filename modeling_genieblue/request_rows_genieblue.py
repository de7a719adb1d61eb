"""Rows of a request: assigning images, tokenizing and padding."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, PreTrainedTokenizerBase

from .chat_messages_genieblue import with_string_contents
from .image_reading_genieblue import flatten_images

OTHER_MEDIA = ("videos", "video", "audio", "audios")
PADDING_OPTIONS = ("padding", "padding_side", "pad_to_multiple_of")


def flat_images(images: Any) -> list[Any]:
    """Return the single images of any nesting, without what is None."""
    return [image for image in flatten_images(images) if image is not None]


def images_by_row(images: Any, places: list[int], *, certain: list[bool], hint: str) -> list[list[Any]]:
    """
    Give each row its images, of which there must be one for each of its places.

    `images` is flat, or has a list for each row; an empty list says of a row that its places are text, unless they
    are `certain`. ValueError with both numbers, and `hint` as the remedy.
    """
    if isinstance(images, (list, tuple)) and any(row is None or isinstance(row, (list, tuple)) for row in images):
        rows = [flat_images(row) for row in images]
        if len(rows) != len(places):
            raise ValueError(
                f"images has {len(rows)} lists for {len(places)} rows of text; expected one list a row, empty where a "
                "row has no image."
            )
        for index, (row, count) in enumerate(zip(rows, places, strict=True)):
            if len(row) != count and (row or certain[index]):
                raise _count_error(f"Row {index}", count, len(row), hint)
        return rows
    flat = flat_images(images)
    if len(flat) != sum(places):
        raise _count_error("The request", sum(places), len(flat), hint)
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in places]


def images_by_part(sources: list[list[Any]], images: Any, hint: str) -> list[list[Any]]:
    """Fill the image parts that came without an image from `images`, in order."""
    missing = [sum(source is None for source in row) for row in sources]
    given = images_by_row(images, missing, certain=[True] * len(missing), hint=hint)
    rows = [iter(row) for row in given]
    return [
        [next(remaining) if source is None else source for source in row]
        for row, remaining in zip(sources, rows, strict=True)
    ]


def text_encoder(pieces: Sequence[str], add_special_tokens: bool) -> Callable[..., Any]:
    """Return what tokenizes a text, given a tokenizer that knows the markers of the images between its pieces."""

    def encode(tokenizer: PreTrainedTokenizerBase, markers: list[str], **options: Any) -> Any:
        marked = "".join(piece + marker for piece, marker in zip(pieces, [*markers, ""], strict=True))
        return tokenizer(marked, add_special_tokens=add_special_tokens, **options)

    return encode


def chat_encoder(chat: list[dict[str, Any]], template_kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return what renders and tokenizes a conversation, given a tokenizer that knows the markers of its images."""

    def encode(tokenizer: PreTrainedTokenizerBase, markers: list[str], **options: Any) -> Any:
        strings = with_string_contents(chat, iter(markers)) if markers else chat
        return tokenize_chats(tokenizer, strings, template_kwargs, options)

    return encode


def tokenize_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Any, template_kwargs: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Return what the tokenizer itself makes of one conversation or a batch."""
    named = take(options, ("padding", "truncation", "max_length", "return_tensors"))
    return tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, tokenizer_kwargs=options, **named, **template_kwargs
    )


def pad_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list]],
    padding: Any,
    max_length: int | None = None,
    padding_side: str | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, list[list]]:
    """Collect rows, padded to one length, on the left by default; EOS stands in for a missing padding token."""
    padding = getattr(padding, "value", padding)
    lengths = [len(row["input_ids"]) for row in rows]
    target = max(lengths)
    if padding in (None, False, "do_not_pad"):
        return {name: [row[name] for row in rows] for name in rows[0]}
    if padding == "max_length":
        target = tokenizer.model_max_length if max_length is None else max_length
        if target >= VERY_LARGE_INTEGER:
            raise ValueError("padding is 'max_length', but the tokenizer has no limit; expected a max_length.")
    target = -(-target // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    pad_id = tokenizer.pad_token_id
    pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
    if pad_id is None and min(lengths) < target:
        raise ValueError(
            f"Rows of {min(lengths)} to {max(lengths)} tokens cannot be padded to {target}, as the tokenizer has "
            "neither a padding nor an end-of-sequence token. Set tokenizer.pad_token, or give one row at a time."
        )
    fill = {"input_ids": pad_id, "token_type_ids": tokenizer.pad_token_type_id, "special_tokens_mask": 1}
    data: dict[str, list[list]] = {name: [] for name in rows[0]}
    for row in rows:
        for name, values in row.items():
            filler = [fill.get(name, 0)] * (target - len(values))
            data[name].append(values + filler if padding_side == "right" else filler + values)
    return data


def encode_and_pad(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[..., Any], return_tensors: str | None = None, **options: Any
) -> BatchFeature:
    """Run `encode` of a tokenizer without a padding token, and pad what comes."""
    padding = {**take(options, PADDING_OPTIONS), "max_length": options.get("max_length")}
    encoding = dict(encode(**options))
    is_batch = any(isinstance(ids, list) for ids in encoding["input_ids"])
    rows = [dict(zip(encoding, values, strict=True)) for values in zip(*encoding.values(), strict=True)]
    data = pad_rows(tokenizer, rows if is_batch else [encoding], **padding)
    if not is_batch and return_tensors is None:
        data = {name: padded[0] for name, padded in data.items()}
    return BatchFeature(data, tensor_type=return_tensors)


def refuse_other_media(options: dict[str, Any]) -> None:
    """ValueError for media that would be passed over; an option that holds none is left out."""
    for name, value in take(options, OTHER_MEDIA).items():
        if value is not None and not (isinstance(value, (list, tuple)) and not value):
            raise ValueError(f"{name} is given, but GenieBlue sees images and texts alone; leave it out.")
    take(options, ("videos_kwargs", "audio_kwargs"))


def zeros_like(ids: Any) -> Any:
    """Return zeros in the form of `ids`, nested lists or a tensor."""
    return [zeros_like(entry) for entry in ids] if isinstance(ids, list) else ids * 0


def take(options: dict[str, Any], names: Any) -> dict[str, Any]:
    """Move the options of these names out of `options`."""
    return {name: options.pop(name) for name in list(options) if name in names}


def _count_error(where: str, tokens: int, images: int, hint: str) -> ValueError:
    return ValueError(f"{where} needs one image for each placeholder (tokens: {tokens}, images: {images}). {hint}")
