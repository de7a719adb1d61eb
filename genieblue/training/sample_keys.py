"""Keys of a sample that are not read: what may carry meaning is refused by name, what only describes passes."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from modeling_genieblue.addresses_genieblue import redacted, shown


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The last word of a name that tells about a sample, and not what it says: `id`, `image_size`, `question_type`.
DESCRIBING = _words(
    "id ids idx index uid uuid hash sha256 md5 source sources origin dataset subset split config task type kind "
    "category categories topic subject domain difficulty level tag tags lang language locale title url urls uri link "
    "links license licence licenses copyright author authors creator attribution date time timestamp created updated "
    "at version revision metadata meta info extra stats width height size sizes length lengths count counts num "
    "number tokens score scores rating ratings quality views likes model generator annotator"
)
# Words of names that mean something whatever else is in them.
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
# Of these even a text that stands in the chat means more than it says there.
PREFERENCES = _words("chosen rejected preference")
# Settings of a single sample, turn or image, and what asks for nothing.
NEUTRAL = {"weight": 1, "loss": True, "train": True, "label": True, "detail": "auto"}
FILE_NAME = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg|pdf|npy|pt)$", re.I)
LONGEST_LABEL = 80  # characters of a word that may name a category


def refuse_lost_keys(
    found: Mapping[str, Any], read: Collection[str], where: str, *, texts: Collection[str] = (), strict: bool = False
) -> None:
    """`ValueError` for a key that is not among those `read` and may carry meaning.

    What passes: a key without a value, with a describing name, or with a text that stands in `texts`, those of the
    chat. Unless `strict`, as for turns and parts, so do numbers and single words, which may be scores and categories.
    """
    for key, value in found.items():
        if key not in read and not _passes(str(key), value, texts, strict):
            raise ValueError(
                f"{where}: the key {shown(key)!r} ({shortened(value)}) is not read, so what it says would be lost. "
                "Write it into the messages, or remove the key."
            )


def _passes(key: str, value: Any, texts: Collection[str], strict: bool) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", key)] or [key]
    first, last = words[0], words[-1]
    is_number = isinstance(value, (bool, int, float))
    if is_nothing(value):
        return True
    if last in NEUTRAL and (is_number or isinstance(value, str)):
        if value == NEUTRAL[last]:
            return True
        if value is False:  # of a label: an answer that is not to be learned
            return False
    if PREFERENCES & set(words) or first == "resized":
        return False
    if last in DESCRIBING and not (last in ADDRESSES and first in MEDIA):
        return True
    if _stands_in(value, texts):
        return True
    if strict or MEANING & {first, last}:
        return not strict and is_number and first in COUNTING and first != last
    return is_number or isinstance(value, str) and _is_label(value)


def is_nothing(value: Any) -> bool:
    """Whether a value is what tables put where there is none."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str) and not value.strip()


def _stands_in(value: Any, texts: Collection[str]) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(item, str) and any(_has_words(text, item.strip()) for text in texts) for item in values)


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _is_label(value: str) -> bool:
    is_one_word = not any(map(str.isspace, value)) and len(value) <= LONGEST_LABEL
    return is_one_word and FILE_NAME.search(value) is None


def shortened(value: Any) -> str:
    """A value as a message can show it."""
    text = " ".join(redacted(repr(value)).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["is_nothing", "refuse_lost_keys", "shortened"]
