"""Input files and folders of commands, other than models."""

from pathlib import Path
from typing import Any


def read_template(path: Path) -> str:
    """Text of the file given as --chat-template; `OSError` if it cannot be read."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OSError(f"--chat-template {path} cannot be read ({reason}): expected a Jinja text file.") from error


def data_source(data: Path) -> Any:
    """The input for `ChatDataset`: the path of a JSONL file, or the dataset that `datasets` saved in a folder."""
    if not data.is_dir():
        return data
    if not any((data / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{data} was not saved by `datasets`: give a JSONL file or a folder from `save_to_disk`.")
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(data))
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(data / name) for name in dataset)
        raise ValueError(f"{data} has several splits: give the folder of one of them ({splits}).")
    return dataset


__all__ = ["data_source", "read_template"]
