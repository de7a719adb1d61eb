"""Prompts of requests with images, as token ids, and the cache that their view may share. Needs no vLLM."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

VIEWS = ("text", "multimodal")
_SECRET = secrets.token_hex(16)  # some of vLLM's entries take a client's salt as it is


def one_token_per_image(ids: Sequence[int], image_token_id: int, image_seq_length: int) -> list[int]:
    """Ids in which every `image_seq_length` image tokens, the tokens of one tile, become one."""
    result, run = [], 0
    for token in ids:
        if token == image_token_id:
            run += 1
            if run % image_seq_length:
                continue
        result.append(token)
    return result


def check_image_tokens(ids: Sequence[int], image_token_id: int, num_images: int) -> None:
    """`ValueError` unless there is one image token for each image."""
    if (found := ids.count(image_token_id)) != num_images:
        raise ValueError(
            f"The prompt has {found} image tokens for {num_images} images: expected one for each, {image_token_id} in "
            "token ids and the placeholder in a text; in messages an image is a part of the content."
        )


def with_stand_ins(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Ids with a token of the prompt in place of the image token, which is past the vocabulary.

    Its embedding is replaced by the image's. As in `generate` it is one that the prompt has, so that a penalty on
    repetition sees no foreign token.
    """
    stand_in = next((token for token in ids if token != image_token_id), 0)
    return [stand_in if token == image_token_id else token for token in ids]


def cache_salt(view: str, given: str | None) -> str | None:
    """What keeps the cached blocks of the two views apart; `given` is the request's own salt.

    A text's block has the hash that the base alone would give it. No client can write a salt of the multimodal view.
    """
    if view == "text" and given is None:
        return None
    return f"text:{given}" if view == "text" else f"multimodal-{_SECRET}:{given or ''}"


def take_view(template_options: Mapping[str, Any], has_images: bool) -> dict[str, Any]:
    """Options of the chat template without `view`; `ValueError` for a view other than the request's own."""
    options = dict(template_options)
    asked, own = options.pop("view", None), VIEWS[has_images]
    if asked not in (None, own):
        raise ValueError(
            f"view is {asked!r}, but this request {'has' if has_images else 'has no'} images and runs the {own} view: "
            "in vLLM the view follows from the images. Leave it out; `genieblue chat --view` runs either."
        )
    return options
