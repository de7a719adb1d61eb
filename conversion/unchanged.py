"""Whether a GenieBlue in a folder, and its base, still are what was saved: nothing is made of weights that are not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hub_cards.model_folder import read_model_config
from modeling_genieblue.model_files_genieblue import (
    ModelFiles,
    changed_weights,
    file_sha256,
    is_path,
    own_weight_places,
    recorded_weights,
    weight_files,
)


def check_unchanged(source: str | os.PathLike, *, base_model: Any = None, subfolder: str | None = None) -> None:
    """`ValueError` with the names of weight files of a GenieBlue, or of its base, that are not as recorded.

    What is made of a damaged model would get sha256 of its own, and the damage could not be told any more. Every byte
    of a local GenieBlue and of a local base is read; the Hub's cache names files by their sha256, which a load
    compares. Folders in which nothing is recorded pass.

    Args:
        source: folder or Hub id of a GenieBlue.
        base_model: given instead of the recorded base, which is not read then.
    """
    if not os.path.isdir(source):
        return
    folder = Path(os.path.realpath(source), subfolder or "")
    config = read_model_config(folder)
    recorded, of_base = recorded_weights(config), config.get("base_model_fingerprint") or {}
    name = config.get("base_model_name_or_path")
    base = None
    if of_base and base_model is None and isinstance(name, str) and is_path(name):
        base = Path(os.path.normpath(folder / name))
    read = [folder / place for place in own_weight_places(folder) if place in recorded]
    if base is not None and base.is_dir():
        read += weight_files(ModelFiles(base).find).values()
    total = sum(path.stat().st_size for path in read)
    with tqdm(desc="Checking weights", total=total, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        if problems := changed_weights(folder, config, on_read=bar.update):
            raise ValueError(f"{source} is not what was saved, so nothing is made of it: {'; '.join(problems)}.")
        if base is None or not base.is_dir():  # a load says so
            return
        problems, _ = other_base_files(ModelFiles(base), of_base, on_read=bar.update)
    if problems:
        raise ValueError(
            f"The base in {base} is not the one that {source} records, so nothing is made of them: "
            f"{'; '.join(problems)}. Fetch the recorded files again."
        )


def other_base_files(
    files: ModelFiles, recorded: dict[str, str], on_read: Callable[[int], Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """In what the weight files of a base differ from the recorded sha256, one sentence each; and theirs by name.

    Every byte is read, and `on_read` is told how many at a time.
    """
    found = {name: file_sha256(path, on_read) for name, path in weight_files(files.find).items()}
    problems = [
        f"{name} is missing" if name not in found else f"{name} is not recorded" if name not in recorded
        else f"sha256 of {name} is {found[name]}, expected {recorded[name]}"
        for name in sorted(recorded.keys() | found.keys())
        if found.get(name) != recorded.get(name)
    ]  # fmt: skip
    return problems, found
