"""Saving and publishing: writes everything GenieBlue adds as a complete folder, atomically."""

import contextlib
import copy
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .addresses_genieblue import refuse_address
from .arguments_genieblue import weight_dtype
from .base_identity_genieblue import weight_file_hashes
from .language_adapter_genieblue import save_adapter, save_adapter_config
from .model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    BASE_FINGERPRINT_NAME,
    CARD_NAME,
    CODE_FILES,
    CONFIG_NAME,
    EVAL_RESULTS,
    EXTRACTION_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    MEASUREMENTS_NAME,
    MODEL_TYPE,
    PROCESSOR_CONFIGS,
    QMAP_NAME,
    QUANTIZED_ADAPTER_NAME,
    QUANTIZED_CODE_FILES,
    QUANTIZED_WEIGHTS_NAME,
    RECIPE_NAME,
    TOKENIZER_FILES,
    TRADE_OFF_NAME,
    VLM_CODE_FILES,
    VLM_FOLDER,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
    file_sha256,
    is_inner_folder,
    is_path,
    name_of_variant,
    own_weight_places,
    read_settings,
    recorded_weights,
    with_siblings,
)
from .own_state_genieblue import check_own_state
from .processing_genieblue import GenieBlueProcessor
from .staging_genieblue import NewFolder

logger = logging.getLogger(__name__)

MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
MULTIMODAL_TREE = "multimodal_language_model"
# Written by an earlier save perhaps, and wrong beside the new files if they stayed.
STALE_WEIGHTS = (INDEX_NAME, WEIGHT_SHARDS, ADAPTER_WEIGHTS_NAME)
STALE_NAMES = (
    *STALE_WEIGHTS, ADAPTER_CONFIG_NAME, RECIPE_NAME, MEASUREMENTS_NAME, EXTRACTION_NAME, TRADE_OFF_NAME, EVAL_RESULTS,
    QUANTIZED_ADAPTER_NAME, QMAP_NAME, QUANTIZED_CODE_FILES, VLM_CODE_FILES, VLM_FOLDER,
)  # fmt: skip
STALE_PROCESSOR_NAMES = (*PROCESSOR_CONFIGS, *TOKENIZER_FILES)
# The same of a base in a subfolder.
STALE_BASE_NAMES = (
    CONFIG_NAME, GENERATION_CONFIG_NAME, CARD_NAME, WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS, QUANTIZED_WEIGHTS_NAME,
    QMAP_NAME, CODE_FILES, *STALE_PROCESSOR_NAMES,
)  # fmt: skip


def save_model(model: Any, save_directory: str | os.PathLike, **options: Any) -> None:
    """Builds the folder beside `save_directory`, then puts it in its place; see `save_pretrained` of the model."""
    with prepared_save(model, save_directory, **options) as put_in_place:
        put_in_place()


@contextlib.contextmanager
def prepared_save(
    model: Any,
    save_directory: str | os.PathLike,
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    facts: dict[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    token: str | bool | None = None,
    replace: bool = True,
) -> Iterator[Callable[[], None]]:
    """A context with the folder built beside `save_directory`, and a function that puts it in its place.

    What fails in the context leaves the old folder. Without `replace` one that is there by then is a
    `FileExistsError`. For the other arguments see `save_pretrained` of the model.
    """
    target = Path(os.path.realpath(save_directory))
    dtype = _check_save(model, target, dtype)
    if state_dict is not None:
        check_own_state(model, state_dict)
    state = model.state_dict() if state_dict is None else state_dict
    _check_tensors(model, state)
    if (
        max_shard_size is not None
        and split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size).is_sharded
    ):
        raise ValueError(
            f"`max_shard_size` is {max_shard_size!r}, but the weights are written whole, as PEFT reads them: leave it "
            "out, or give more."
        )
    if variant is not None and model.provenance.files:
        raise ValueError("What this GenieBlue was loaded from is copied as it is: leave out `variant`.")
    if token is not None:
        model.provenance.access = {**model.provenance.access, "token": token}
    with NewFolder(target, "saving", replace=replace) as new:
        try:
            has_processor = _write_files(model, new.staging, target, processor, dtype, facts, state, variant)
        except (OSError, SafetensorError) as error:
            remains = "its previous contents are unchanged" if target.exists() else "no incomplete files are left"
            raise OSError(
                f"{target} could not be saved ({error}); {remains}. Check the free space and the permissions there."
            ) from error
        inner = _inner_base(target)
        stale = (*_stale_names(variant), *(STALE_PROCESSOR_NAMES if has_processor else ()), *inner)
        yield lambda: new.put_in_place(lambda old: _foreign_files(old, stale, inner))


def _check_save(model: Any, target: Path, dtype: str | torch.dtype | None) -> torch.dtype:
    """The precision to save in; `ValueError` or `OSError` if the model cannot be saved, or not there."""
    if model.multimodal_language_model is None:
        raise ValueError("This GenieBlue has no base, so no adapter to save: use `from_base` or `from_pretrained`.")
    model._as_built.check(model.config, model.language_model)
    written = model._check_save(None if dtype is None else weight_dtype(dtype))
    if os.path.isfile(target):
        raise OSError(f"{target} is a file: give a folder to save into.")
    check_replaceable(target)
    return written


def check_replaceable(target: Path) -> None:
    """`ValueError` where a save would destroy another model, above all the base's own folder."""
    config_file = target / CONFIG_NAME
    if os.path.isfile(config_file):
        model_type = read_settings(config_file).get("model_type")
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"{target} contains a {model_type!r} model, which this save would replace: give another folder."
            )
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} is the current folder and cannot be replaced: save into another one.")


def _inner_base(folder: Path) -> list[str]:
    """The subfolder into which an earlier save of a model with a base of its own wrote that base."""
    config_file = folder / CONFIG_NAME
    config = read_settings(config_file) if config_file.is_file() else {}
    name = config.get("base_model_name_or_path")
    is_ours = config.get("quantization") is not None
    return [name.removeprefix("./")] if is_ours and is_inner_folder(name) else []


def _stale_names(variant: str | None) -> list[str]:
    """What an earlier save may have written; the weights that are there stay beside those of a variant."""
    return [name for name in STALE_NAMES if variant is None or name not in STALE_WEIGHTS]


def _foreign_files(folder: Path, stale: Iterable[str], inner: Iterable[str] = ()) -> list[Path]:
    """What lies in a model's folder and is not ours (notes, checkpoints), as paths in it.

    That of its adapter counts, and those of a base in `inner` subfolders.
    """
    stale_names = {**dict.fromkeys(inner, STALE_BASE_NAMES), ADAPTER_FOLDER: stale, "": stale}
    return [
        entry.relative_to(folder)
        for place, names in stale_names.items()
        for entry in (list((folder / place).iterdir()) if (folder / place).is_dir() else ())
        if not any(fnmatchcase(entry.name, pattern) for pattern in names)
    ]


def _write_files(
    model: Any,
    staging: Path,
    target: Path,
    processor: Any,
    dtype: torch.dtype,
    facts: dict[str, Any] | None,
    state: Mapping[str, torch.Tensor],
    variant: str | None,
) -> bool:
    """Writes all files into `staging`; returns whether a processor is among them."""
    is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", target.name) is not None
    model._write_weights(staging, dtype, state, is_checkpoint)
    config = _config_to_save(model, target, dtype)
    config.weight_fingerprint = _weight_fingerprint(staging, target, variant)
    config.save_pretrained(staging)
    # Not by its `save_pretrained`, which refuses the flags that some published bases come with.
    model.generation_config.to_json_file(staging / GENERATION_CONFIG_NAME)
    lora_config = copy.deepcopy(model._lora_config)
    lora_config.base_model_name_or_path = config.base_model_name_or_path
    lora_config.revision = config.base_model_revision
    save_adapter_config(lora_config, staging / ADAPTER_FOLDER)
    _write_samples(model.provenance.base_samples, staging / BASE_FINGERPRINT_NAME)
    for source in code_files(_own_class(model)):
        shutil.copyfile(source, staging / source.name)
    processor = processor or _own_processor(model)
    if processor is not None:
        processor.save_pretrained(staging)
    for name, content in {**model.provenance.facts(model._kept_facts), **(facts or {})}.items():
        if isinstance(content, bytes):
            (staging / name).write_bytes(content)
        else:
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_card(staging, target)
    if variant is not None:
        for name in (WEIGHTS_NAME, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS_NAME}"):
            os.rename(staging / name, staging / name_of_variant(name, variant))
    return processor is not None


def _weight_fingerprint(staging: Path, target: Path, variant: str | None) -> dict[str, str]:
    """sha256 of the weights in `staging`, and as they were recorded of those that stay in `target` beside them."""
    written = {name_of_variant(place, variant): file_sha256(staging / place) for place in own_weight_places(staging)}
    config_file = target / CONFIG_NAME
    recorded = recorded_weights(read_settings(config_file)) if config_file.is_file() else {}
    staying = {path.as_posix() for path in _foreign_files(target, _stale_names(variant))}
    kept = {place: recorded[place] for place in staying & recorded.keys()}
    return dict(sorted((kept | written).items()))


def _own_class(model: Any) -> type:
    """The class that a repository is to name: ours, and not one that a user made from it."""
    package = __name__.rpartition(".")[0]
    return next(kind for kind in type(model).__mro__ if kind.__module__.rpartition(".")[0] == package)


def code_files(model_class: type) -> list[Path]:
    """The Python files that a model of a class needs: those of the class, its configuration and its processor."""
    names = [kind.__module__.rpartition(".")[2] for kind in (model_class, model_class.config_class)]
    names += [reference.partition(".")[0] for reference in model_class.processor_map.values()]
    folder = Path(__file__).parent
    return [folder / name for name in with_siblings(folder, [f"{name}.py" for name in names])]


def write_trained_weights(
    model: Any, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor], is_checkpoint: bool
) -> None:
    """Vision tower and projector into `model.safetensors`, copied blocks and LoRA into the adapter.

    Trainer reads `model.safetensors` alone of a checkpoint, and gives it to `load_state_dict`: there it holds
    everything, as it is in memory.
    """
    tensors = {
        name: value.detach().to("cpu", None if is_checkpoint or not value.is_floating_point() else dtype).clone(
            memory_format=torch.contiguous_format
        )
        for name, value in state.items()
        if is_checkpoint or name.partition(".")[0] in model.own_modules
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    tree = f"{MULTIMODAL_TREE}."
    of_view = {name.removeprefix(tree): value for name, value in state.items() if name.startswith(tree)}
    save_adapter(model.multimodal_language_model, of_view, folder / ADAPTER_FOLDER, dtype)


def _check_tensors(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """`ValueError` for tensors that somebody added to the model, or put in the place of its own."""
    if others := [name for name in state if name.partition(".")[0] not in (*model.own_modules, MULTIMODAL_TREE)]:
        raise ValueError(
            f"A saved GenieBlue has no place for {', '.join(others[:3])} ({len(others)} tensors in all): it holds "
            f"{', '.join(model.own_modules)} and an adapter. Keep and save what you add outside the model."
        )
    # What was loaded in another form is copied from its files.
    if not model.provenance.files and (changed := sorted(state.keys() ^ model._as_built.names)):
        raise ValueError(
            f"{changed[0]} ({len(changed)} tensors in all) is not what this GenieBlue was built with: a part of it "
            "was replaced, quantized perhaps, and its folder could not be loaded. Save the model as it was in 16 or "
            "32 bits; `genieblue quantize` quantizes the folder."
        )


def _config_to_save(model: Any, target: Path, dtype: torch.dtype) -> Any:
    """Configuration with the code map, the base's file hashes, and a local base as a path relative to `target`."""
    name, revision = model.config.base_model_name_or_path, model.config.base_model_revision
    if name is None:
        logger.warning("The location of the base is unknown: pass `base_model=` whenever you load this GenieBlue.")
    elif model.config.base_model_fingerprint is None:
        model.config.base_model_fingerprint = weight_file_hashes(name, revision, **model.provenance.access) or None
        if model.config.base_model_fingerprint is None:
            logger.warning("The weight files of %s are not available locally, so their sha256 is not recorded.", name)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("use_cache", None)  # set by Trainer
    for part in (config.text_config, config.vision_config, getattr(config, "vlm_config", None)):
        if part is not None and os.path.exists(getattr(part, "_name_or_path", None) or ""):
            part.name_or_path = ""  # do not store a local path
    own_class = _own_class(model)
    config.auto_map = {"AutoConfig": _reference(own_class.config_class), **own_class.processor_map}
    config.auto_map |= dict.fromkeys(MODEL_CLASSES, _reference(own_class))
    config.architectures = [own_class.__name__]
    config.dtype = dtype
    if config.vision_config is not None:
        config.vision_config.dtype = dtype
    if name is not None and os.path.isabs(name):
        relative = os.path.relpath(name, target)
        config.base_model_name_or_path = relative if relative.startswith(".") else os.path.join(".", relative)
    return config


def _reference(kind: type) -> str:
    """A class as an `auto_map` names it."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def _write_samples(samples: dict[str, dict], path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(sample)}" for name, sample in samples.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _own_processor(model: Any) -> Any:
    """The processor that came with the model, or one made from the tokenizer of its base.

    `None` if there is none, or if the model's own cannot be read: one with other settings must not take its place.
    """
    request = model.provenance.source
    try:
        if request is not None and is_path(request.path) and not os.path.exists(request.path):
            logger.warning("%s is gone: creating a new processor from the base's tokenizer.", request.path)
        elif request is not None and any(request.find(name) for name in PROCESSOR_CONFIGS):
            trust = bool(request.base_kwargs.get("trust_remote_code"))
            return model.processor_class.from_pretrained(request.path, trust_remote_code=trust, **request.hub_kwargs)
        if model.config.base_model_name_or_path is not None:
            tokenizer = AutoTokenizer.from_pretrained(
                model.config.base_model_name_or_path,
                revision=model.config.base_model_revision,
                trust_remote_code=model.language_model.is_remote_code(),  # then its code was allowed to run already
                **model.provenance.access,
            )
            return model.make_processor(tokenizer)
    except (OSError, ValueError) as error:
        logger.warning("No processor is saved (%s): pass `processor=` to `save_pretrained`.", error)
    return None


def processor_for(config: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> GenieBlueProcessor:
    """A processor for models of `config`, with their base's tokenizer; `options` are those of `from_base`."""
    return GenieBlueProcessor.from_base(
        tokenizer,
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tile_size=config.vision_config.image_size,
        **options,
    )


def _write_card(folder: Path, target: Path) -> None:
    """The card that `target` has if somebody wrote or edited it, otherwise one that is rendered from the new files."""
    existing = target / CARD_NAME
    try:
        from hub_cards.model_card import card_info_from_folder, is_as_generated, write_model_card
    except ModuleNotFoundError as error:  # running as remote code, without the package that renders cards
        if error.name != "hub_cards":
            raise
        logger.info("The package `genieblue` is not installed: no model card is rendered.")
        if existing.is_file():
            shutil.copyfile(existing, folder / CARD_NAME)
        return
    if existing.is_file() and not is_as_generated(existing.read_text(encoding="utf-8")):
        shutil.copyfile(existing, folder / CARD_NAME)
    else:
        write_model_card(folder, card_info_from_folder(folder, repo_name=target.name))


def push_model(
    model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
) -> Any:
    """Saves into a temporary folder and uploads it as one commit; see `push_to_hub` of the model."""
    refuse_address(repo_id, "The repository")
    name = model.config.base_model_name_or_path
    goes_along = is_inner_folder(name) and any(place.startswith(f"{name[2:]}/") for place in model.provenance.files)
    if not goes_along and (name is None or is_path(name) or model.config.base_model_revision is None):
        raise ValueError(
            f"The base is recorded as {name!r} at {model.config.base_model_revision!r}; others can only load this "
            "GenieBlue if its base is on the Hub: make it with `base_model_name_or_path` (Hub id) and "
            "`base_model_revision` (commit)."
        )
    commit = {
        "token": token, "private": private, "revision": revision, "create_pr": create_pr,
        "commit_message": commit_message or "Upload GenieBlue", "commit_description": commit_description,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, repo_id.rsplit("/", 1)[-1])
        model.save_pretrained(folder, processor=processor, dtype=dtype, max_shard_size=max_shard_size)
        try:
            from hub_cards.publish import publish_folder
        except ModuleNotFoundError as error:  # as remote code, without the package that checks and describes a folder
            if error.name != "hub_cards":
                raise
            publish_folder = _publish_without_card
        return publish_folder(folder, repo_id, **commit)


def _publish_without_card(
    folder: Path, repo_id: str, *, token: Any, private: bool | None, revision: str | None, **commit: Any
) -> Any:
    """All files of `folder` as one commit (`upload_folder` may make several of them); a README there stays."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    sent = {addition.path_in_repo for addition in additions}
    stale = [
        CommitOperationDelete(name)
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in sent and _is_stale(name)
    ]
    return api.create_commit(repo_id, operations=[*stale, *additions], revision=revision, **commit)


def _is_stale(name: str) -> bool:
    """Whether a file of a repository is of an earlier push, and wrong beside a new one."""
    folder, _, file = name.rpartition("/")
    return folder in ("", ADAPTER_FOLDER) and any(fnmatchcase(file, pattern) for pattern in STALE_NAMES)
