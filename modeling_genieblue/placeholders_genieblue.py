"""Places of images in a text, which no text can imitate, and the tokens that represent them."""

import copy
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AddedToken
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

FEWEST_MARKERS = 16
# Settings of a fast tokenizer that can be replaced in place, without any trace in its attributes.
BACKEND_PARTS = ("normalizer", "pre_tokenizer", "post_processor")


class TextWithImages(str):
    """
    A text in which images have their places: `pieces` is what stands before, between and behind them.

    As a string it reads with `placeholder` for each image; the same characters within a piece are text. A slice, and
    the sum with a text behind it, know their images too; other string methods return plain strings.
    """

    pieces: tuple[str, ...]
    placeholder: str

    def __new__(cls, pieces: Sequence[str], placeholder: str) -> "TextWithImages":
        """Join the pieces: one more than there are images."""
        text = super().__new__(cls, placeholder.join(pieces))
        text.pieces, text.placeholder = tuple(pieces), placeholder
        return text

    def __getnewargs__(self) -> tuple[tuple[str, ...], str]:
        return self.pieces, self.placeholder

    def __add__(self, text: str) -> "TextWithImages":
        first, *others = getattr(text, "pieces", (text,))
        return type(self)([*self.pieces[:-1], self.pieces[-1] + first, *others], self.placeholder)

    def __getitem__(self, index: Any) -> str:
        if not isinstance(index, slice) or index.step not in (None, 1):
            return super().__getitem__(index)
        start, stop, _ = index.indices(len(self))
        pieces, position = [""], 0
        for number, piece in enumerate(self.pieces):
            if number:
                shown = self.placeholder[max(start - position, 0) : max(stop - position, 0)]
                position += len(self.placeholder)
                if shown == self.placeholder:
                    pieces.append("")
                else:
                    pieces[-1] += shown
            pieces[-1] += piece[max(start - position, 0) : max(stop - position, 0)]
            position += len(piece)
        return type(self)(pieces, self.placeholder)


def text_pieces(text: str, placeholder: str) -> Sequence[str]:
    """Return what stands around the images of a text; in a plain string every placeholder is an image."""
    # Asked for by its attribute: the class of another copy of this file is another class.
    return getattr(text, "pieces", None) or text.split(placeholder)


class MarkingTokenizer:
    """
    Copies of a tokenizer that know, as tokens, strings that mark the places of images.

    A marker stands beside a text as a special token does, in any tokenizer and with any of its settings. It holds a
    random number of this object, so no text of a request can hold it.
    """

    def __init__(self) -> None:
        self._secret = f"{secrets.randbelow(10**20):020}"
        self._copied: tuple[Any, PreTrainedTokenizerBase, dict[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copied": None}

    def markers(self, count: int) -> list[str]:
        """Return the strings that mark the places of `count` images, in order."""
        # Neither letters, which a template may turn to upper case, nor blanks, which it may strip.
        return [f"\U0010fb1e{self._secret}.{index}\U0010fb1f" for index in range(count)]

    def pieces(self, text: str, count: int) -> list[str]:
        """Return what stands around the `count` images of a rendered text; ValueError unless they come in order."""
        *parts, last = re.split(rf"\U0010fb1e{self._secret}\.(\d+)\U0010fb1f", text)
        found = [int(number) for number in parts[1::2]]
        if found != list(range(count)):
            raise _order_error(found, count, "The conversation")
        return [*parts[::2], last]

    def encode(
        self,
        original: PreTrainedTokenizerBase,
        encode: Callable[..., Any],
        images: list[list[int]],
        *,
        index: int = 0,
        truncation: Any = None,
        max_length: int | None = None,
        **options: Any,
    ) -> dict[str, list]:
        """
        Tokenize one row, with the ids `images[i]` for its image `i`.

        `encode(tokenizer, markers, **options)` tokenizes its text. A row without images is what `original` makes of
        it. ValueError, which names row `index`, for a truncation that would cut an image.
        """
        count, image_ids = len(images), sum(map(len, images))
        tokenizer, numbers = self.tokenizer(original, count) if count else (original, {})
        options = {"return_attention_mask": True, "return_token_type_ids": False, "verbose": False, **options}
        encoding = encode(tokenizer, self.markers(count), **options)
        found = [numbers[token] for token in encoding["input_ids"] if token in numbers]
        if found != list(range(count)):
            raise _order_error(found, count, f"Row {index}")
        length = len(encoding["input_ids"]) - count + image_ids
        limit = tokenizer.model_max_length if max_length is None else max_length
        if truncation not in (None, False, "do_not_truncate") and length > limit:
            room = limit - image_ids + count
            if room > count:
                encoding = encode(tokenizer, self.markers(count), truncation=truncation, max_length=room, **options)
            if sum(token in numbers for token in encoding["input_ids"]) != count or len(encoding["input_ids"]) > room:
                raise ValueError(
                    f"Row {index} has {length} tokens, {image_ids} of them for images, and truncation to {limit} "
                    f"would cut an image. Set max_length to at least {length}, or use a smaller max_tiles."
                )
        ids = encoding["input_ids"]
        places = [images[numbers[token]] if token in numbers else [token] for token in ids]
        columns = {
            name: [value for value, place in zip(values, places, strict=True) for _ in place]
            for name, values in encoding.items()
        }
        return columns | {"input_ids": [token for place in places for token in place]}

    def tokenizer(
        self, original: PreTrainedTokenizerBase, count: int
    ) -> tuple[PreTrainedTokenizerBase, dict[int, int]]:
        """Return a copy of `original` as it is now that knows `count` markers or more, and each one's number by id."""
        state = _state(original)
        if self._copied is None or self._copied[0] != state or len(self._copied[2]) < count:
            count = max(FEWEST_MARKERS, 1 << (count - 1).bit_length())
            tokenizer = copy.deepcopy(original)
            # Not special, for special ones are split by `split_special_tokens`.
            markers = [AddedToken(marker, special=False, normalized=False) for marker in self.markers(count)]
            tokenizer.add_tokens(markers)
            ids: Any = tokenizer.convert_tokens_to_ids(self.markers(count))
            self._copied = state, tokenizer, {token: number for number, token in enumerate(ids)}
        return self._copied[1:]


def _order_error(found: list[int], count: int, where: str) -> ValueError:
    """What to say of a row whose images are not each there once, in their order."""
    return ValueError(
        f"{where} has {count} images, of which the tokens show {found} (counted from 0); expected each of them once "
        "and in order. A chat template that leaves out, repeats or moves messages cannot be used with images there, "
        "nor can a slow tokenizer with split_special_tokens, which knows no tokens apart from text."
    )


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What of a tokenizer can be changed by its user, compared by value."""
    plain = (str, int, float, bool, type(None))
    settings = {name: value for name, value in vars(tokenizer).items() if isinstance(value, plain)}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = [str(getattr(backend, part, None)) for part in BACKEND_PARTS]
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    # A token of the vocabulary that is added again, perhaps with other flags, changes no length.
    added = backend.get_added_tokens_decoder() if hasattr(backend, "get_added_tokens_decoder") else {}
    return tokenizer, len(tokenizer), settings, copy.deepcopy(tokenizer.chat_template), special, parts, added
