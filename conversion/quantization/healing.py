"""Healing: the multimodal view is trained on the values of a quantized base, before it is quantized itself.

The adapter learns to make up for the base's rounding errors, as in QLoRA (Dettmers et al., 2023). The text view is not
trained, so it stays the quantized base bit for bit.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from conversion.quantization.bases import read_matching_base, take_rounded_values
from modeling_genieblue.as_built_genieblue import AsBuilt
from modeling_genieblue.base_identity_genieblue import weight_file_hashes
from modeling_genieblue.model_files_genieblue import HUB_KEYS

logger = logging.getLogger(__name__)

TRAINED_ON = "quantized base"  # in the facts of a training stage


def put_on_quantized_base(model: Any, name: str | os.PathLike, **hub_kwargs: Any) -> dict[str, str]:
    """Gives the base of a 16-bit GenieBlue, in memory only, the values of a quantized copy of it.

    What is saved afterwards is an adapter for the original base, to be quantized on `name` (`--quantized-base`).

    Args:
        name: folder or Hub id of the quantized base.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`.

    Returns facts for the record of the training. Raises `ValueError` for a base that is not quantized or was made from
    another one, `OSError` if it does not exist; the model is unchanged then.
    """
    access = {key: value for key, value in hub_kwargs.items() if key in HUB_KEYS and value is not None}
    settings = read_matching_base(name, model.config, access)
    take_rounded_values(model, name, settings, access)
    model._as_built = AsBuilt(model)  # what it stands on from here on
    return {TRAINED_ON: f"{os.path.basename(os.path.normpath(name))}, sha256 {base_digest(name, access)}"}


def warn_of_other_base(
    training_recipe: Mapping[str, Mapping[str, Any]], base_digest: Callable[[], str | None]
) -> None:
    """Warns if a GenieBlue was trained on another quantized base than the one on which it is quantized.

    `training_recipe` has the facts of each stage of its training; `base_digest` is called if one names a base, and
    gives `None` for a new one.
    """
    trained_on = next((str(facts[TRAINED_ON]) for facts in training_recipe.values() if TRAINED_ON in facts), None)
    if trained_on is None or ((digest := base_digest()) is not None and trained_on.endswith(digest)):
        return
    logger.warning(
        "This GenieBlue was trained to make up for the errors of the quantized base %s, not for those of another one: "
        "give that one (--quantized-base).",
        trained_on,
    )


def base_digest(name: str | os.PathLike, access: dict[str, Any]) -> str:
    """The start of the sha256 of a quantized base's weights."""
    return next(iter(weight_file_hashes(name, None, **access).values()))[:16]
