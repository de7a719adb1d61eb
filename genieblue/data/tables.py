"""Tables of samples: a `datasets.Dataset`, whose rows are mapped into memory and read when they are asked for."""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from genieblue.data.chat_samples import IMAGE_KEYS, IN_A_COLUMN

TEXTS = ("string", "large_string", "string_view")  # dtypes of columns with paths
BATCH = 1000  # rows that are checked at a time
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`
HUB = "hf:"
HUB_NAME = re.compile(
    r"hf:(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[^@:\[\]/]+))?(@(?P<revision>[^:\[\]]+))?(\[(?P<split>.+)\])?"
)
HUB_FORM = "hf:OWNER/NAME, with /CONFIG, @REVISION and [SPLIT] as needed"


class Table:
    """The samples of a `datasets.Dataset`; `sha256` is its fingerprint."""

    def __init__(self, dataset: Any, name: str = "", folder: Path | None = None):
        """`name` is for messages; image paths are relative to `folder`."""
        self._dataset, self._name, self._folder = dataset, name, folder
        self.sha256: str | None = getattr(dataset, "_fingerprint", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Any:
        return self._dataset[number]

    def where(self, number: int) -> str:
        """The number of a sample's row, from 0, with the table's name if it has one."""
        return f"{self._name}, sample {number}" if self._name else f"sample {number}"

    def folder(self, number: int) -> Path | None:
        """The folder that image paths are relative to."""
        return self._folder

    def outlines(self) -> Iterator[Callable[[], Any]]:
        """All samples in order, each as a function, without images that are in the table."""
        kept = [name for name in self._dataset.column_names if not self._has_images(name)]
        found = {"images": IN_A_COLUMN} if len(kept) < len(self._dataset.column_names) else {}
        for batch in self._dataset.select_columns(kept).with_format("arrow").iter(BATCH):
            yield from (partial(operator.or_, row, found) for row in batch.to_pylist())

    def _has_images(self, name: str) -> bool:
        feature = self._dataset.features[name]
        return name in IMAGE_KEYS and getattr(getattr(feature, "feature", feature), "dtype", None) not in TEXTS


def open_parquet(paths: Sequence[Path]) -> Table:
    """The rows of Parquet files, which `datasets` converts once and keeps in its cache; `ValueError` if it cannot."""
    datasets = _datasets()
    try:
        dataset = datasets.Dataset.from_parquet([escape(str(path)) for path in paths])
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{_shown(paths)} cannot be read by `datasets` ({' '.join(str(cause).split())}).") from error
    return Table(dataset, _shown(paths), paths[0].parent)


def open_saved(folder: Path) -> Table:
    """The rows that `save_to_disk` wrote; `ValueError` for a folder of several splits."""
    datasets = _datasets()
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(folder / name) for name in dataset)
        raise ValueError(f"{folder} has several splits: give the folder of one of them ({splits}).")
    return Table(dataset, str(folder))


def check_hub_name(name: str) -> None:
    """`ValueError` if a text does not name a data set on the Hub."""
    if HUB_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} names no data set on the Hub: expected {HUB_FORM}.")


def open_hub(name: str) -> Table:
    """The rows of a data set on the Hub, downloaded to the cache of `datasets`; `OSError` if it cannot be had.

    Without a split in `name`, the data set must have only one.
    """
    datasets = _datasets()
    found = HUB_NAME.fullmatch(name)
    assert found is not None  # see `check_hub_name`
    options = {"revision": found["revision"]} if found["revision"] else {}
    split = found["split"]
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(found["id"], found["config"], **options)
            if len(splits) != 1:
                raise ValueError(f"it has several splits: give one, such as {name}[{splits[0]}] ({', '.join(splits)})")
            split = splits[0]
        dataset = datasets.load_dataset(found["id"], found["config"], split=split, **options)
        if found["revision"]:
            _check_commit(dataset, found["id"], found["revision"])
        if "__key__" in dataset.column_names:
            raise ValueError("it is a WebDataset: download its .tar files, and give their folder")
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        if reason.startswith("Config name is missing"):  # the rest tells how to call `load_dataset`
            configs = datasets.get_dataset_config_names(found["id"], **options)
            whole, rest = f"{HUB}{found['id']}/{configs[0]}", name.removeprefix(f"{HUB}{found['id']}")
            reason = f"it has several configurations: give one, such as {whole}{rest} ({', '.join(configs)})"
        raise OSError(f"{name} cannot be read from the Hub ({reason}).") from error
    return Table(dataset, name)


def _check_commit(dataset: Any, name: str, revision: str) -> None:
    """`ValueError` if a data set is not of a revision: without the Hub, `datasets` takes the last one in its cache."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # whatever the client raises without a connection
        commit = revision
    # The cache has a folder for each commit.
    if other := {Path(file["filename"]).parent.name for file in dataset.cache_files} - {commit}:
        raise ValueError(
            f"the Hub cannot be asked for the revision {revision}, and the cache of `datasets` has {other.pop()}: "
            "connect to the Hub, or give that commit as revision"
        )


def _shown(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("This data needs the package datasets: pip install 'genieblue[train]'.") from error
    return datasets
