"""Creates or reuses a quantized base LLM: a separate repository for any number of adapters and plain users."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from safetensors.torch import save_file
from torch import nn

import modeling_genieblue
from conversion.quantization.precision import QuantizationRecipe
from conversion.staging import check_can_be_made
from conversion.verdict import warn_of_loss
from hub_cards.code_files import code_files
from hub_cards.model_card import is_as_generated
from hub_cards.one_commit import matches
from hub_cards.publish_base import BASE_COMPANIONS, FOREIGN_WEIGHTS, PUBLISHED_NAMES
from hub_cards.quantized_base_card import write_quantized_base_card
from modeling_genieblue import GenieBlueConfig, QuantizedGenieBlueConfig
from modeling_genieblue.base_identity_genieblue import tensor_samples, weight_file_hashes
from modeling_genieblue.loading_genieblue import hub_commit
from modeling_genieblue.model_files_genieblue import (
    ACCESS_KEYS,
    CARD_NAME,
    CHANGED_BASE,
    CONFIG_NAME,
    LICENSE_FILES,
    QMAP_NAME,
    QUANTIZED_WEIGHTS_NAME,
    changed_weights,
    file_sha256,
    is_path,
    read_settings,
    recorded_weights,
    with_siblings,
    write_json,
)
from modeling_genieblue.quantized_base_genieblue import load_quantized_base, read_base_quantization
from modeling_genieblue.quantized_files_genieblue import qmap_content
from modeling_genieblue.quantized_linears_genieblue import CODE_ALIGNMENT, scales_of
from modeling_genieblue.quantized_parts_genieblue import quantized_values
from modeling_genieblue.quantized_settings_genieblue import BASE_PARTS, QUANT_METHOD
from modeling_genieblue.saving_genieblue import check_replaceable
from modeling_genieblue.staging_genieblue import replaced_folders

logger = logging.getLogger(__name__)

COMPANIONS = (*BASE_COMPANIONS, "*.py")
BASE_CODE = "quantized_base_genieblue.py"
# Relative error of one weight matrix: far above that of any rounding.
LARGEST_ROUNDING_ERROR = 0.5
# For a quantized base whose source is not recorded: above the rounding error of most matrices, below the difference of
# many fine-tunes.
LARGEST_UNRECORDED_ERROR = {"qint4": 0.25, "qint8": 0.1}


def check_source(source: str | os.PathLike, config: GenieBlueConfig) -> None:
    """`ValueError` for a quantized GenieBlue, and for one that does not record its base."""
    if isinstance(config, QuantizedGenieBlueConfig):
        raise ValueError(
            f"{source} is already quantized ({config.quantization['llm']}): give the 16-bit GenieBlue it was made "
            "from."
        )
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"{source} does not record its base, whose configuration and tokenizer are needed: save it with its base."
        )


def check_places(
    source: str | os.PathLike,
    config: GenieBlueConfig,
    output: Path,
    base_output: Path | None,
    overwrite: bool,
    is_base_named: bool = False,
    existing_base: str | os.PathLike | None = None,
) -> None:
    """`OSError` or `ValueError` for output folders that are in use, especially by the input.

    A base is only replaced if the user named its folder (`is_base_named`) or if it belongs to the replaced GenieBlue,
    since other GenieBlues may run on it.
    """
    read: list[Path] = []
    if os.path.isdir(source):
        read.append(Path(os.path.realpath(source)))
        if is_path(config.base_model_name_or_path):
            read.append(Path(os.path.realpath(read[0] / config.base_model_name_or_path)))
    if existing_base is not None and os.path.isdir(existing_base):
        read.append(Path(os.path.realpath(existing_base)))  # in a self-contained GenieBlue, perhaps
    for folder in (output, base_output):
        if folder is None:
            continue
        _check_place(folder)
        for other in read:
            if folder == other or folder in other.parents or other in folder.parents:
                raise ValueError(f"{folder} overlaps the input {other}: give another folder.")
    if output.exists() and not overwrite:
        raise OSError(f"{output} already exists: give a new folder, or allow replacing it (--overwrite).")
    if base_output is not None and (output in (base_output, *base_output.parents) or base_output in output.parents):
        raise ValueError(f"One of {output} and {base_output} contains the other: give two separate folders.")
    if output.exists():
        check_replaceable(output)
    if base_output is None or not base_output.exists():
        return
    is_ours = (base_output / CONFIG_NAME).is_file() and read_base_quantization(base_output) is not None
    if not is_ours:
        raise ValueError(f"{base_output} already exists and is not a quantized base, so it is not replaced: give "
                         "another folder (--base-out).")  # fmt: skip
    if not overwrite or not (is_base_named or base_output == _base_of(output)):
        raise OSError(
            f"The quantized base {base_output} already exists, and other GenieBlues may run on it: reuse it "
            f"(--quantized-base {base_output}), or give another folder for a new one (--base-out). It is replaced "
            "only with both --overwrite and --base-out; other GenieBlues on it no longer load then."
        )


def _check_place(folder: Path) -> None:
    if folder.parent == folder:
        raise ValueError(f"{folder} is the root folder: give a new folder inside it.")
    check_can_be_made(folder)


def _base_of(output: Path) -> Path | None:
    """Folder of the base recorded in the GenieBlue in `output`, if it exists."""
    path = output / CONFIG_NAME
    name = read_settings(path).get("base_model_name_or_path") if path.is_file() else None
    return Path(os.path.realpath(output / name)) if isinstance(name, str) and is_path(name) else None


def warn_of_parted_base(output: Path, base: Path | None) -> None:
    """Warns if a run that was killed between its last two renames left the GenieBlue in `output` without its base.

    The base that it fits lies in a hidden folder then, and that of the run in its place.
    """
    config_file = output / CONFIG_NAME
    fits = read_settings(config_file).get("base_model_fingerprint") if config_file.is_file() else None
    if base is None or not fits or _recorded_sha256(base) == fits:
        return
    for old in replaced_folders(base):
        if _recorded_sha256(old) == fits:
            logger.warning(
                "%s was made on the base in %s; the one in %s is of a run that was ended before its GenieBlue was in "
                "place. To have both as they were, remove %s and move %s there.",
                output,
                old,
                base,
                base,
                old,
            )


def _recorded_sha256(base: Path) -> dict[str, str]:
    """sha256 by file as a quantized base records them; none for another folder."""
    return recorded_weights((read_base_quantization(base) if (base / CONFIG_NAME).is_file() else None) or {})


def files_of_others(base: Path) -> list[Path]:
    """What lies in the folder of a quantized base and was not written with it (notes, licences), as paths in it."""
    try:
        code = code_files(base)
    except (OSError, SyntaxError):  # damaged, or somebody's own
        code = []
    ours = tuple({*PUBLISHED_NAMES, *FOREIGN_WEIGHTS, *code} - set(LICENSE_FILES))
    return [Path(entry.name) for entry in base.iterdir() if not matches(entry.name, ours)]


def keep_edited_card(old: Path, new: Path) -> None:
    """Copies the card of the quantized base `old` to `new`, if somebody wrote or edited it."""
    card = old / CARD_NAME
    if card.is_file() and not is_as_generated(card.read_text(encoding="utf-8")):
        shutil.copyfile(card, new / CARD_NAME)


def base_folder(name: str, revision: str | None, hub_kwargs: dict[str, Any]) -> Path:
    """Folder with the base's configuration and tokenizer: its own, or a repository snapshot without weights."""
    if is_path(name):
        return Path(name)
    options = {key: value for key, value in hub_kwargs.items() if key in ACCESS_KEYS}
    return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_NAME, *COMPANIONS], **options))


def check_existing_base(
    name: str | os.PathLike, recipe: QuantizationRecipe, config: GenieBlueConfig, access: dict[str, Any]
) -> dict[str, Any]:
    """The recorded settings of a quantized base, as from `read_matching_base`; they must match `recipe` too."""
    settings = read_matching_base(name, config, access)
    for part in (*BASE_PARTS, "group_size", "activations"):
        if settings.get(part) != getattr(recipe, part):
            raise ValueError(
                f"{name} has {part} {settings.get(part)}, but {getattr(recipe, part)} was requested: request "
                "what it has, or leave it out to make a new one."
            )
    return settings


def read_matching_base(name: str | os.PathLike, config: GenieBlueConfig, access: dict[str, Any]) -> dict[str, Any]:
    """The recorded settings of a quantized copy of the base in `config`.

    Raises `ValueError` if it is not quantized, was made from another base, or is a folder whose weights are not those
    that it records (every byte is read); `OSError` if it does not exist. Warns if its verdict is that it lost too
    much.
    """
    is_folder = os.path.isdir(name)
    if not is_folder and (is_path(name) or "/" not in os.fspath(name)):
        raise FileNotFoundError(f"There is no quantized base in {name}: give its folder or Hub id (org/name).")
    settings = read_base_quantization(name, **access)
    if settings is None:
        unseen = "" if is_folder else ", or it cannot be reached on the Hub"
        raise ValueError(
            f"{name} is not a base quantized by GenieBlue{unseen}: give one that `genieblue quantize` made."
        )
    made_from, own = (settings.get("source") or {}).get("fingerprint"), config.base_model_fingerprint
    if made_from and own and made_from != own:
        raise ValueError(
            f"{name} is not a quantized copy of this model's base, {config.base_model_name_or_path}: it was made from "
            f"files with sha256 {_short(made_from)}, those of this base have {_short(own)}. Give a copy of this base, "
            "which `genieblue quantize` makes."
        )
    if is_folder and (problems := changed_weights(Path(name), settings, CHANGED_BASE)):
        raise ValueError(f"{name} is not what was quantized: {'; '.join(problems)}.")
    warn_of_loss(
        f"The quantized base {name}", settings, "Text answers of what is made on it lose as much, and `verify` fails: "
        "quantize it anew with more bits, or accept the loss (`push --accept-loss` of the base).", tell_accepted=True,
    )  # fmt: skip
    return settings


def use_existing_base(
    model: Any, name: str | os.PathLike, settings: dict[str, Any], access: dict[str, Any]
) -> dict[str, dict]:
    """Points the model to an existing quantized base, and copies that base's values into the model's own.

    `settings` come from `check_existing_base`. Returns samples of its tensors; raises `ValueError` for another base.
    """
    base = take_rounded_values(model, name, settings, access)
    model.config.base_model_name_or_path = os.path.realpath(name) if os.path.isdir(name) else str(name)
    # The commit that was just loaded, from the cache.
    model.config.base_model_revision = None if os.path.isdir(name) else hub_commit(name, None, **access)
    model.config.base_model_fingerprint = weight_file_hashes(name, model.config.base_model_revision, **access)
    return tensor_samples(quantized_values(base))


def take_rounded_values(
    model: Any, name: str | os.PathLike, settings: dict[str, Any], access: dict[str, Any]
) -> nn.Module:
    """Copies the values of a quantized base into the model's own, and returns it.

    Raises `ValueError` for another base; the model is unchanged then.
    """
    is_recorded = bool((settings.get("source") or {}).get("fingerprint") and model.config.base_model_fingerprint)
    base = load_quantized_base(name, trust_remote_code=model.language_model.is_remote_code(), **access)
    _check_rounded_values(base, model.language_model, name, is_recorded)
    rounded = dict(base.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for parameter_name, parameter in model.language_model.named_parameters():
            parameter.copy_(_values(rounded[parameter_name]))
    return base


def rounding_of(settings: dict[str, Any] | None, recipe: QuantizationRecipe) -> dict[str, str]:
    """Parts of an existing quantized base, if any, with another rounding than `recipe`'s, and which."""
    if settings is None:
        return {}
    other = {}
    if settings.get("rounding") != recipe.rounding:
        how = f"{settings.get('rounding')}, as the base was rounded before"
        other = {part: how for part in BASE_PARTS if getattr(recipe, part) != "w16a16"}
    return other | (settings.get("other_rounding") or {})


@torch.no_grad()
def _check_rounded_values(quantized: nn.Module, base: nn.Module, name: str | os.PathLike, is_recorded: bool) -> None:
    """`ValueError` if the values of a quantized base are not roundings of those of `base`."""
    others = dict(quantized.named_parameters(remove_duplicate=False))
    for parameter_name, parameter in base.named_parameters():
        other = others.get(parameter_name)
        if other is None or other.shape != parameter.shape:
            raise ValueError(
                f"{name} is not a quantized copy of this model's base: it has no matching {parameter_name}."
            )
        is_quantized = scales_of(other) is not None
        values = _values(other)
        own = parameter.to(other.dtype).float()  # what is not rounded is in the quantized base's precision
        distance = float((values - own).norm() / own.norm().clamp(min=1e-12))
        allowed = 0.0
        if is_quantized:
            allowed = LARGEST_ROUNDING_ERROR if is_recorded else LARGEST_UNRECORDED_ERROR[other.qtype.name]
        if not distance <= allowed:  # NaN fails too
            raise ValueError(
                f"{name} is not a quantized copy of this model's base: {parameter_name} differs by {distance:.1%}."
            )


def _values(parameter: Any) -> torch.Tensor:
    """The float32 values of a plain parameter or a quantized one."""
    return (parameter if scales_of(parameter) is None else parameter.dequantize()).float()


def _short(fingerprint: dict[str, str]) -> str:
    return ", ".join(f"{sha256[:12]}… ({file})" for file, sha256 in sorted(fingerprint.items())[:2])


def write_quantized_base(
    folder: Path,
    base: nn.Module,
    source: Path,
    kinds: dict[str, str],
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
) -> None:
    """Fills `folder` with a base that has `tensors` in place of the weights named by `kinds`.

    Args:
        base: provides everything that is not quantized.
        source: folder of the unquantized base, whose configuration, tokenizer and code are copied.
        kinds: the quantization map, `{module: "qint4" | "qint8"}`.
        tensors: quanto's state dict of those modules, without their biases.
        settings: recorded in `quantization_config`.
    """
    state = plain_state(base.state_dict(), kinds)
    for tied in _tied_copies(base):
        state.pop(tied, None)
    save_aligned({**state, **tensors}, folder / QUANTIZED_WEIGHTS_NAME)
    write_json(folder / QMAP_NAME, qmap_content(kinds))
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, folder / path.name)
            if path.suffix == ".py":
                # transformers caches code by its content, and would confuse equal files with the base's own.
                with (folder / path.name).open("a", encoding="utf-8") as file:
                    file.write("\n# Copied from the base by GenieBlue, which quantized it.\n")
    runtime = Path(modeling_genieblue.__file__).parent
    for name in with_siblings(runtime, [BASE_CODE]):
        shutil.copyfile(runtime / name, folder / name)
    config = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    own_map = config.get("auto_map") or {}
    config["auto_map"] = {name: own_map[name] for name in ("AutoConfig", "AutoTokenizer") if name in own_map}
    config["auto_map"]["AutoModelForCausalLM"] = f"{Path(BASE_CODE).stem}.QuantizedBaseForCausalLM"
    config.pop("torch_dtype", None)
    config["dtype"] = settings["activations"]
    # Only a mark: transformers warns of an unknown method and continues. The name of the weight file keeps its own
    # classes from initializing random weights.
    recorded = {QUANTIZED_WEIGHTS_NAME: file_sha256(folder / QUANTIZED_WEIGHTS_NAME)}
    config["quantization_config"] = {"quant_method": QUANT_METHOD, **settings, "weight_fingerprint": recorded}
    # The base's own class is only needed if transformers has none.
    if base.is_remote_code():
        config["quantization_config"]["base_auto_map"] = own_map
    write_json(folder / CONFIG_NAME, config)
    write_quantized_base_card(folder, source)


def record_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Records the verdict on the text view in a quantized base's folder and card."""
    config = read_settings(folder / CONFIG_NAME)
    config["quantization_config"]["verdict"] = verdict
    write_json(folder / CONFIG_NAME, config)
    write_quantized_base_card(folder)


def plain_state(state: Mapping[str, torch.Tensor], kinds: dict[str, str]) -> dict[str, torch.Tensor]:
    """A state dict without the weights named by `kinds`."""
    quantized = {f"{name}.weight" for name in kinds}
    return {name: value.detach().cpu().contiguous() for name, value in state.items() if name not in quantized}


def save_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file with aligned codes, so that the 8-bit kernel can use them in the mapped file.

    safetensors puts wider numbers first, so all codes follow the first one in multiples of 16 bytes. But its header is
    only aligned to 8 bytes: blanks after the one word of its metadata shift the rest.
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
    logger.debug("The codes in %s are not aligned and will be copied at load.", path)


def _tied_copies(base: nn.Module) -> list[str]:
    """Name of the LM head's weight if it is the embedding's, which is stored once."""
    names = {id(module): name for name, module in base.named_modules()}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    return [f"{names[id(head)]}.weight"] if head is not None and head.weight is embedding.weight else []
