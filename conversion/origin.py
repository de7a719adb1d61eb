"""Which 16-bit GenieBlue a quantized one or a bundle was made from, and where it is now."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.unchanged import check_unchanged
from hub_cards.model_folder import read_model_config
from modeling_genieblue import GenieBlueConfig
from modeling_genieblue.loading_genieblue import hub_commit
from modeling_genieblue.model_files_genieblue import is_hub_id, recorded_weights


def origin_of(
    source: str | os.PathLike, config: GenieBlueConfig, output: Path, revision: str | None, access: dict[str, Any]
) -> dict[str, Any]:
    """Location and sha256 of the GenieBlue `source`, as they are recorded in what is made of it in `output`.

    Args:
        config: its configuration.
        revision: of the Hub, as it was asked for; the commit is recorded.
        access: options of the Hub, such as `token`.
    """
    place = {"name": str(source), "revision": None}
    if os.path.isdir(source):
        place["name"] = os.path.relpath(os.path.realpath(source), output)
    else:
        place["revision"] = hub_commit(str(source), revision, **access)
    return {**place, "fingerprint": config.weight_fingerprint}


def find_origin(recorded: Mapping[str, Any], folder: Path, *, is_local: bool = True) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id of the GenieBlue that `origin_of` recorded in `folder`, and the commit to load, if any.

    `is_local` says whether `folder` is the user's own, or downloaded. Raises `OSError` if it is not recorded, not
    there, or has other weights or another base by now: every byte of a folder is read.
    """
    name = recorded.get("name")
    if not isinstance(name, str):
        raise OSError("the model that it was made from is not recorded")
    if is_hub_id(name, folder):
        return name, {"revision": recorded.get("revision")}
    if not is_local:
        raise OSError(f"{name} is a folder on the computer where it was made")
    name = os.path.normpath(folder / name)
    if not os.path.isdir(name):
        raise OSError(f"the folder {name}, from which it was made, does not exist")
    fingerprint = recorded.get("fingerprint")
    if fingerprint and recorded_weights(read_model_config(Path(name))) != fingerprint:
        raise OSError(f"{name} was saved again since, with other weights than it was made from")
    try:
        check_unchanged(name)
    except ValueError as error:
        raise OSError(str(error)) from error
    return name, {}
