"""Files and folders that commands are given beside a model."""

from pathlib import Path
from typing import Any


def read_template(path: Path) -> str:
    """Text of the file given as --chat-template; `OSError` that names it if there is none."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise OSError(f"--chat-template {path} cannot be read ({reason}): expected a text file in Jinja.") from error


def data_source(data: Path) -> Any:
    """What `ChatDataset` reads: a JSONL file as it is, a folder as the data set that `datasets` saved."""
    if not data.is_dir():
        return data
    if not any((data / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{data} is a folder that `datasets` did not save: give a JSONL file, or one that it saved.")
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(data))
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(data / name) for name in dataset)
        raise ValueError(f"{data} holds several splits: give the folder of one of them ({splits}).")
    return dataset


__all__ = ["data_source", "read_template"]
