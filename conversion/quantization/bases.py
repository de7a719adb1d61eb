"""A quantized copy of a base LLM as a repository of its own, for any number of adapters and for plain users."""

import json
import logging
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from safetensors.torch import save_file
from torch import nn

import modeling_genieblue
from conversion.staging import StagingFolder
from hub_cards.code_files import with_siblings
from hub_cards.publish_base import BASE_COMPANIONS
from hub_cards.quantized_base_card import write_quantized_base_card
from modeling_genieblue import GenieBlueConfig
from modeling_genieblue.loading_genieblue import ACCESS_KEYS, is_local_reference
from modeling_genieblue.quantized_base_genieblue import read_base_quantization
from modeling_genieblue.quantized_files_genieblue import qmap_content
from modeling_genieblue.quantized_linears_genieblue import (
    CODE_ALIGNMENT,
    QMAP_NAME,
    QUANT_METHOD,
    QUANTIZED_WEIGHTS_NAME,
)
from modeling_genieblue.saving_genieblue import refuse_foreign_folder
from modeling_genieblue.settings_files_genieblue import read_settings

logger = logging.getLogger(__name__)

COMPANIONS = (*BASE_COMPANIONS, "*.py")
BASE_CODE = "quantized_base_genieblue.py"


def refuse_unfit_source(source: str | os.PathLike, config: GenieBlueConfig) -> None:
    """`ValueError` for a GenieBlue that is quantized already, or whose base could not be found again."""
    if config.quantization is not None:
        raise ValueError(
            f"{source} is quantized already ({config.quantization['llm']}): give the 16-bit GenieBlue it was made "
            "from."
        )
    if config.base_model_name_or_path is None:
        raise ValueError(f"{source} names no base, whose configuration and tokenizer are needed: save it with one.")


def refuse_taken_places(
    source: str | os.PathLike,
    config: GenieBlueConfig,
    output: Path,
    base_output: Path | None,
    overwrite: bool,
    is_base_named: bool = False,
) -> None:
    """`OSError` or `ValueError` for folders that hold something, above all what is to be quantized.

    A base is only replaced if the user named its folder (`is_base_named`), or if it is that of the GenieBlue which is
    replaced as well: others may run on it.
    """
    read: list[Path] = []
    if os.path.isdir(source):
        read.append(Path(os.path.realpath(source)))
        if is_local_reference(config.base_model_name_or_path):
            read.append(Path(os.path.realpath(read[0] / config.base_model_name_or_path)))
    for folder in (output, base_output):
        if folder is None:
            continue
        _refuse_impossible_place(folder)
        for other in read:
            if folder == other or folder in other.parents or other in folder.parents:
                raise ValueError(f"{folder} overlaps {other}, which is only read: give another folder.")
    if output.exists() and not overwrite:
        raise OSError(f"{output} exists already: give a new folder, or allow it to be replaced (--overwrite).")
    if base_output is not None and (output in (base_output, *base_output.parents) or base_output in output.parents):
        raise ValueError(f"{output} and {base_output} lie in one another: give two folders, side by side.")
    if output.exists():
        refuse_foreign_folder(output)
    if base_output is None or not base_output.exists():
        return
    is_ours = (base_output / "config.json").is_file() and read_base_quantization(base_output) is not None
    if not is_ours:
        raise ValueError(f"{base_output} exists already and holds no quantized base, so it is not replaced: give "
                         "another folder (--base-out).")  # fmt: skip
    if not overwrite or not (is_base_named or base_output == _base_of(output)):
        raise OSError(
            f"The quantized base {base_output} exists already, and other GenieBlues may run on it: use it again "
            f"(--quantized-base {base_output}), or give another folder for a new one (--base-out). It is replaced "
            "only with both --overwrite and --base-out; other GenieBlues on it no longer load then."
        )


def _refuse_impossible_place(folder: Path) -> None:
    if folder.parent == folder:
        raise ValueError(f"{folder} is the root of all folders: give a new folder in it.")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        inside = "" if there == folder else f", so {folder} cannot be made"
        raise OSError(f"{there} is a file{inside}: give a folder.")


def _base_of(output: Path) -> Path | None:
    """Folder of the base that the GenieBlue in `output` names, if one is there."""
    path = output / "config.json"
    name = read_settings(path).get("base_model_name_or_path") if path.is_file() else None
    return Path(os.path.realpath(output / name)) if isinstance(name, str) and is_local_reference(name) else None


class NewFolder:
    """A folder to fill, `staging`, which takes the place of `target` when `put_in_place` is called.

    A context: what fails within it, before or after that call, leaves `target` as it was. The old folder is kept
    beside it until the end. Raises `OSError` that says where the old one lies if it cannot be moved back.
    """

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> "NewFolder":
        self._staging_folder = StagingFolder(self.target, "writing")
        place = self._staging_folder.folder
        self.staging, self._old = place / self.target.name, place / f"{self.target.name}.old"
        self.staging.mkdir()
        return self

    def put_in_place(self) -> None:
        """Swaps the filled folder in."""
        if self.target.exists():
            os.rename(self.target, self._old)
        os.rename(self.staging, self.target)

    def __exit__(self, kind: type[BaseException] | None, *_error: Any) -> None:
        if kind is not None:
            self._put_back()
        self._staging_folder.remove()

    def _put_back(self) -> None:
        try:
            if not self.staging.exists():  # it is in place: an interrupt may have come right behind the rename
                os.rename(self.target, self.staging)
            if self._old.exists():
                os.rename(self._old, self.target)
        except OSError as error:
            # Nothing is removed: the old folder is in there.
            where = f"move {self._old} there" if self._old.exists() else "remove it"
            raise OSError(f"{self.target} cannot be put back as it was ({error}): {where} by hand.") from error


def base_folder(name: str, revision: str | None, hub_kwargs: dict[str, Any]) -> Path:
    """Folder with the base's configuration and tokenizer: its own, or a snapshot of the repository without weights."""
    if is_local_reference(name):
        return Path(name)
    options = {key: value for key, value in hub_kwargs.items() if key in ACCESS_KEYS}
    return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", *COMPANIONS], **options))


def write_quantized_base(
    folder: Path,
    base: nn.Module,
    source: Path,
    kinds: dict[str, str],
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
) -> None:
    """Fills `folder` with a base that has `tensors` in place of the weights that `kinds` names.

    Args:
        base: gives all that is not quantized.
        source: folder of the unquantized base, whose configuration, tokenizer and code are copied.
        kinds: the quantization map, `{module: "qint4" | "qint8"}`.
        tensors: quanto's state dict of those modules, but for their biases.
        settings: what stands in `quantization_config` for a reader.
    """
    state = plain_state(base, kinds)
    for tied in _tied_copies(base):
        state.pop(tied, None)
    save_aligned({**state, **tensors}, folder / QUANTIZED_WEIGHTS_NAME)
    write_json(folder / QMAP_NAME, qmap_content(kinds))
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, folder / path.name)
            if path.suffix == ".py":
                # transformers knows code by its content: classes of the same code would be taken for the base's own.
                with (folder / path.name).open("a", encoding="utf-8") as file:
                    file.write("\n# Copied from the base by GenieBlue, which quantized it.\n")
    runtime = Path(modeling_genieblue.__file__).parent
    for name in with_siblings(runtime, [BASE_CODE]):
        shutil.copyfile(runtime / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own_map = config.get("auto_map") or {}
    config["auto_map"] = {name: own_map[name] for name in ("AutoConfig", "AutoTokenizer") if name in own_map}
    config["auto_map"]["AutoModelForCausalLM"] = f"{Path(BASE_CODE).stem}.QuantizedBaseForCausalLM"
    config.pop("torch_dtype", None)
    config["dtype"] = settings["activations"]
    # Only a mark: of a method that it does not know transformers warns, and goes on. What keeps its own classes from
    # making random weights is the name of the weight file.
    config["quantization_config"] = {"quant_method": QUANT_METHOD, **settings}
    # The base's own class is only needed where transformers has none.
    if base.is_remote_code():
        config["quantization_config"]["base_auto_map"] = own_map
    write_json(folder / "config.json", config)
    write_quantized_base_card(folder, source)


def plain_state(tree: nn.Module, kinds: dict[str, str]) -> dict[str, torch.Tensor]:
    """The state dict of `tree` without the weights that `kinds` names."""
    quantized = {f"{name}.weight" for name in kinds}
    return {
        name: value.detach().cpu().contiguous() for name, value in tree.state_dict().items() if name not in quantized
    }


def save_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file whose codes lie where the 8-bit kernel can use them straight from the mapped file.

    safetensors puts wider numbers first, so that all codes follow the first one in multiples of 16 bytes, and its
    header is only aligned to 8 bytes: blanks behind its one word of metadata move the rest.
    """
    for format_name in ("pt", "pt" + 8 * " "):
        metadata = {"format": format_name}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
        header = parse_local_safetensors_file_metadata(path).tensors.values()
        with path.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
        first = min((tensor.data_offsets[0] for tensor in header if tensor.dtype in ("I8", "U8")), default=0)
        if (data + first) % CODE_ALIGNMENT == 0:
            return
    logger.debug("%s: codes are not aligned, they will be copied at load.", path)


def _tied_copies(base: nn.Module) -> list[str]:
    """Names of an LM head that shares the embedding's weight: it is stored once."""
    names = {id(module): name for name, module in base.named_modules()}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    return [f"{names[id(head)]}.weight"] if head is not None and head.weight is embedding.weight else []


def write_json(path: Path, content: Any) -> None:
    """A JSON file that people read as well."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["NewFolder", "base_folder", "write_quantized_base"]
