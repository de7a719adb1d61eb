"""Request routing: the view of each row and each cache, and how mixed batches are split and joined."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from .compat_genieblue import CACHE_NAMES, cache_field

TEXT, MULTIMODAL = "text", "multimodal"


class MixedViewsCache:
    """The caches of a batch in which some rows ran the text view and others the multimodal view.

    Attributes: `is_multimodal`, a boolean by row; one cache by view, as `cache["text"]` and `cache["multimodal"]`.
    """

    def __init__(self, is_multimodal: list[bool]):
        self.is_multimodal = is_multimodal
        self._caches: dict[str, Any] = {TEXT: None, MULTIMODAL: None}

    def __getitem__(self, view: str) -> Any:
        return self._caches[view]

    def __setitem__(self, view: str, cache: Any) -> None:
        self._caches[view] = cache

    def get_seq_length(self) -> int:
        """Number of cached positions, the same in both views."""
        return 0 if self[TEXT] is None else int(self[TEXT].get_seq_length())


def cache_view(cache: Any) -> str | None:
    """The view that filled `cache`; `None` while it is empty.

    Only the multimodal view leaves a mark: the text view is the base itself, which knows nothing of views.
    """
    if cache is None or not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) == 0:
        return None
    return getattr(cache, "genieblue_view", TEXT)


def as_mixed_cache(cache: Any, is_multimodal: list[bool]) -> MixedViewsCache:
    """The caches of a mixed batch, empty at first; `ValueError` for one cache, which no two views can share."""
    if cache is None:
        return MixedViewsCache(is_multimodal)
    if isinstance(cache, MixedViewsCache):
        return cache
    raise ValueError(
        f"A batch that mixes texts and images needs a cache by view, and got one {type(cache).__name__}: leave "
        "`past_key_values` out; a pass returns the caches of both views together."
    )


def _mark(cache: Any) -> None:
    if hasattr(cache, "get_seq_length"):
        cache.genieblue_view = MULTIMODAL


def mark_given_cache(_view: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the multimodal view: a cache that it is given carries the view's name from now on."""
    for name in CACHE_NAMES:
        _mark(kwargs.get(name))


def mark_returned_cache(_view: nn.Module, _args: tuple, outputs: Any) -> None:
    """Forward hook of the multimodal view: so does a cache that it returns, in an output object or in a tuple."""
    for value in outputs if isinstance(outputs, tuple) else (getattr(outputs, cache_field(outputs), None),):
        _mark(value)


def choose_view(has_image: bool, cache: Any, view: str | None, training: bool) -> str:
    """The view of one row; `ValueError` if what is asked for contradicts the row's images or the cache."""
    if view not in (None, TEXT, MULTIMODAL):
        raise ValueError(f"`view` is {view!r}: expected 'text', 'multimodal' or None (chosen by row).")
    if view == TEXT and has_image:
        raise ValueError(
            "The text view cannot process image tokens, which this row has: leave out `view` or the image."
        )
    wanted = view or (MULTIMODAL if has_image or training else None)
    made_by = cache_view(cache)
    if made_by is None:
        if hasattr(cache, "genieblue_view"):
            del cache.genieblue_view  # emptied by `reset()`: it is anybody's again
        return wanted or TEXT
    if wanted not in (None, made_by):
        raise ValueError(
            f"The cache was made by the {made_by} view and cannot be continued in the {wanted} view: prefill the "
            "whole conversation again, without `past_key_values`."
        )
    return made_by


def choose_views(has_image: list[bool], cache: Any, view: str | None, training: bool) -> list[bool]:
    """Which rows of a batch run the multimodal view; plain booleans, on which a compiled pass does not stop."""
    caches = [cache] * len(has_image)
    if isinstance(cache, MixedViewsCache):
        if len(cache.is_multimodal) != len(has_image):
            raise ValueError(
                f"The cache holds {len(cache.is_multimodal)} rows, the batch {len(has_image)}: prefill again."
            )
        caches = [cache[MULTIMODAL if row else TEXT] for row in cache.is_multimodal]
    views = [choose_view(row, row_cache, view, training) for row, row_cache in zip(has_image, caches, strict=True)]
    return [row_view == MULTIMODAL for row_view in views]


def check_inputs(input_ids: Any, pixel_values: Any, num_tiles: Any) -> None:
    """`ValueError` unless ids are a tensor (batch, length), and pixels one of as many tiles as `num_tiles` counts."""
    if input_ids is not None:
        is_ids = isinstance(input_ids, torch.Tensor) and input_ids.dtype in (torch.int64, torch.int32)
        if not is_ids or input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"`input_ids` is {_described(input_ids)}: expected token ids as a tensor (batch, length), at least "
                "one in each row, as the processor returns them with `return_tensors='pt'`."
            )
    if pixel_values is None:
        return
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"`pixel_values` is {_described(pixel_values)}: expected a tensor (num_tiles, channels, height, width), "
            "as the processor returns it with `return_tensors='pt'`."
        )
    counted = len(pixel_values) if num_tiles is None else int(torch.as_tensor(num_tiles).sum())
    if counted != len(pixel_values):
        raise ValueError(
            f"`num_tiles` counts {counted} tiles, `pixel_values` holds {len(pixel_values)}: pass both from one call "
            "of the processor."
        )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def check_tiles(
    pixel_values: torch.Tensor | None, num_image_tokens: int, vision_config: Any, image_seq_length: int
) -> None:
    """`ValueError` unless `pixel_values` holds tiles (num_tiles, channels, image_size, image_size) for all tokens."""
    if pixel_values is None:
        if num_image_tokens:
            raise ValueError(
                f"The request has {num_image_tokens} image tokens but no `pixel_values`: pass all that the processor "
                "returned (`model.generate(**inputs)`)."
            )
        return
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected (num_tiles, channels, height, width)."
        )
    tile = (vision_config.num_channels, vision_config.image_size, vision_config.image_size)
    if pixel_values.shape[1:] != tile:
        raise ValueError(
            f"`pixel_values` holds tiles of {tuple(pixel_values.shape[1:])}, expected {tile} (channels, height, "
            "width): use the processor that belongs to this model."
        )
    expected = len(pixel_values) * image_seq_length
    if num_image_tokens != expected:
        raise ValueError(
            f"Image tokens and image features do not match: tokens: {num_image_tokens}, features: {expected} "
            f"({len(pixel_values)} tiles of {image_seq_length}). Pass the ids and the pixels of one call of the "
            "processor, uncut."
        )


# Arguments with one entry by row; everything else means the same for all rows.
BATCHED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


def split_rows(is_multimodal: list[bool]) -> dict[str, list[int]]:
    """The rows of each view in a mixed batch."""
    views = {TEXT: False, MULTIMODAL: True}
    return {view: [row for row, sees in enumerate(is_multimodal) if sees == seeing] for view, seeing in views.items()}


def take_rows(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments of a pass over the chosen rows of a batch."""
    return {
        name: value[rows] if name in BATCHED and isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def merge_rows(text: Any, multimodal: Any, rows: dict[str, list[int]]) -> dict[str, Any]:
    """Outputs of the two parts of a mixed batch, rows in their old order, but for caches."""

    def merge(first: Any, second: Any) -> Any:
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
            if missing := second.shape[-1] - first.shape[-1]:  # tokens of a VLM alone, or rows that it never gives
                narrow = (0, abs(missing))
                first = pad(first, narrow, value=float("-inf")) if missing > 0 else first
                second = pad(second, narrow, value=float("-inf")) if missing < 0 else second
            merged = first.new_empty(len(first) + len(second), *first.shape[1:])
            merged[rows[TEXT]], merged[rows[MULTIMODAL]] = first, second.to(merged.device, merged.dtype)
            return merged
        if isinstance(first, tuple) and isinstance(second, tuple):
            return tuple(merge(one, other) for one, other in zip(first, second, strict=True))
        return None

    names = ("logits", "last_hidden_state", "hidden_states", "attentions")
    return {name: merge(text[name], multimodal[name]) for name in names if name in text and name in multimodal}


def join_sequences(
    text: torch.Tensor, multimodal: torch.Tensor, rows: dict[str, list[int]], pad_token_id: int
) -> torch.Tensor:
    """Generated ids of the two parts, (rows, length) each, as one batch padded on the right."""
    length = max(text.shape[1], multimodal.shape[1])
    per_row = len(text) // len(rows[TEXT])  # `num_return_sequences`
    merged = text.new_full((len(text) + len(multimodal), length), pad_token_id)
    for part, chosen in ((text, rows[TEXT]), (multimodal, rows[MULTIMODAL])):
        places = [row * per_row + number for row in chosen for number in range(per_row)]
        merged[places, : part.shape[1]] = part.to(merged.device)
    return merged
