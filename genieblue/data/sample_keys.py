"""Keys of a sample that are not read: refused by name if they may carry meaning, ignored if they only describe it."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from modeling_genieblue.addresses_genieblue import redacted, shown


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Last words of key names that describe a sample rather than being content: `id`, `image_size`, `question_type`.
DESCRIBING = _words(
    "id ids idx index uid uuid hash sha256 md5 source sources origin dataset subset split config task type kind "
    "category categories topic subject domain difficulty level tag tags lang language locale title url urls uri link "
    "links license licence licenses copyright author authors creator attribution date time timestamp created updated "
    "exif at version revision metadata meta info extra stats width height size sizes length lengths count counts num "
    "number tokens score scores rating ratings quality views likes model generator annotator"
)
# Words that make a key meaningful, whatever other words it has.
MEDIA = _words("video videos audio audios speech sound image images img imgs picture pictures photo frame frames")
MEANING = MEDIA | _words(
    "depth file files path paths document documents system tool tools function functions call calls answer answers "
    "response responses output outputs completion caption captions text texts weight loss mask train reasoning "
    "thinking thought thoughts context history instruction question prompt query input choices options detail bbox "
    "boxes points refusal role target targets label gt truth gold solution rationale explanation hint hints persona "
    "character knowledge prefix suffix template preamble developer ocr transcript subtitle subtitles region crop "
    "segmentation code stop skip ignore exclude use correct desirable"
)
ADDRESSES = _words("url urls uri link links")
# In front of a word that means something: `num_images` is a number and no image.
COUNTING = _words("num n count number total max min has is")
# Meaningful even if their text also occurs in the chat.
PREFERENCES = _words("chosen rejected preference")
# Settings of a single sample, turn or image, with the value that has no effect.
NEUTRAL = {"weight": 1, "loss": True, "train": True, "label": True, "detail": "auto"}
FILE_NAME = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg|pdf|npy|pt)$", re.I)
LONGEST_LABEL = 80  # characters of a word that can be a category


def check_unread_keys(
    found: Mapping[str, Any], read: Collection[str], where: str, *, texts: Collection[str] = (), strict: bool = False
) -> None:
    """`ValueError` for a key that is not in `read` and may carry meaning.

    Ignored are keys without a value, with a descriptive name, or with a text that already occurs in `texts` (those of
    the chat). Unless `strict` (for turns and parts), so are numbers and single words: scores and categories.
    """
    for key, value in found.items():
        if key not in read and not _is_ignorable(str(key), value, texts, strict):
            raise ValueError(
                f"{where}: the key {shown(key)!r} ({shortened(value)}) is not read, so its content would be lost. "
                "Move it into the messages, or remove the key."
            )


def _is_ignorable(key: str, value: Any, texts: Collection[str], strict: bool) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", key)] or [key]
    first, last = words[0], words[-1]
    is_number = isinstance(value, (bool, int, float))
    if is_missing(value):
        return True
    if last in NEUTRAL and (is_number or isinstance(value, str)):
        if value == NEUTRAL[last]:
            return True
        if value is False:  # an answer that must not be learned
            return False
    if PREFERENCES & set(words) or first == "resized":
        return False
    if last in DESCRIBING and not (last in ADDRESSES and first in MEDIA):
        return True
    if _occurs_in(value, texts):
        return True
    if strict or MEANING & {first, last}:
        return not strict and is_number and first in COUNTING and first != last
    return is_number or isinstance(value, str) and _is_label(value)


def is_missing(value: Any) -> bool:
    """Whether a value means "missing", as in a table."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(is_missing, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str) and not value.strip()


def _occurs_in(value: Any, texts: Collection[str]) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(item, str) and any(_has_words(text, item.strip()) for text in texts) for item in values)


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _is_label(value: str) -> bool:
    is_one_word = not any(map(str.isspace, value)) and len(value) <= LONGEST_LABEL
    return is_one_word and FILE_NAME.search(value) is None


def shortened(value: Any) -> str:
    """A value shortened for a message."""
    text = " ".join(redacted(repr(value)).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
