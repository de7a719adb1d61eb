"""Saving and publishing: a complete folder of what GenieBlue adds, written whole or not at all."""

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .arguments_genieblue import weight_dtype
from .base_identity_genieblue import BASE_FINGERPRINT_NAME, WEIGHTS_NAME, weight_file_hashes
from .language_views_genieblue import ADAPTER_FOLDER, adapter_parameters, save_adapter, save_adapter_config
from .loading_genieblue import is_inner_folder, is_local_reference
from .processing_genieblue import GenieBlueProcessor
from .settings_files_genieblue import read_settings

logger = logging.getLogger(__name__)

OWN_MODULES = ("vision_tower", "multi_modal_projector")
AUTO_MAP = {
    "AutoConfig": "configuration_genieblue.GenieBlueConfig",
    "AutoModel": "modeling_genieblue.GenieBlueForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_genieblue.GenieBlueForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_genieblue.GenieBlueForConditionalGeneration",
    "AutoImageProcessor": "image_processing_genieblue.GenieBlueImageProcessor",
    "AutoProcessor": "processing_genieblue.GenieBlueProcessor",
}
PROCESSOR_SETTINGS = ("processor_config.json", "preprocessor_config.json")
RECIPE_NAME, MEASUREMENTS_NAME = "training_recipe.json", "measurements.json"
SHORT_NAME = 200  # of a name, so that it can be part of another one
# Written by an earlier save perhaps, and wrong beside the new files if they stayed.
STALE_NAMES = (
    "model.safetensors.index.json", "model-*-of-*.safetensors", "adapter_config.json", RECIPE_NAME,
    MEASUREMENTS_NAME, "adapter_model.safetensors", "quantized_adapter.safetensors", "quanto_qmap.json",
)  # fmt: skip
STALE_PROCESSOR_NAMES = (
    "processor_config.json", "preprocessor_config.json", "chat_template.*", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
)  # fmt: skip


def save_model(
    model: Any,
    save_directory: str | os.PathLike,
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Builds the folder beside `save_directory`, then puts it in its place; see `save_pretrained` of the model."""
    if model.multimodal_language_model is None:
        raise ValueError("This GenieBlue has no base, so no adapter to save: use `from_base` or `from_pretrained`.")
    dtype = None if dtype is None else weight_dtype(dtype)
    quantized = model.config.quantization
    if quantized is not None and dtype not in (None, getattr(torch, quantized["activations"])):
        raise ValueError(
            f"This GenieBlue is quantized for {quantized['activations']} and cannot be saved in {dtype}: quantize the "
            "16-bit one again."
        )
    trained = (value.requires_grad for _, _, value in adapter_parameters(model.multimodal_language_model))
    if quantized is not None and any(trained):
        raise ValueError("A quantized GenieBlue is saved as it was loaded, and training lost: train in 16 bits.")
    target = Path(os.path.realpath(save_directory))
    if os.path.isfile(target):
        raise OSError(f"{target} is a file: give a folder to save into.")
    refuse_foreign_folder(target)
    staging = _make_staging(target)
    try:
        try:
            has_processor = _write_files(model, staging, target, processor, dtype, facts)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{target} could not be saved ({error}); what it held before is untouched.") from error
        file_mode, folder_mode = _usual_modes(staging)
        for path in staging.rglob("*"):
            path.chmod(folder_mode if path.is_dir() else file_mode)  # safetensors writes files for their owner alone
        staging.chmod(target.stat().st_mode if target.exists() else folder_mode)
        stale = (*STALE_NAMES, *(STALE_PROCESSOR_NAMES if has_processor else ()), *_inner_base(target))
        _put_in_place(staging, target, stale)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make_staging(target: Path) -> Path:
    """A new folder beside `target`; `OSError` that names `target` and not that folder if there can be none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # refuses a name that is too long, which only the last rename would otherwise
        return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:SHORT_NAME]}.saving-"))
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror or error}): give a folder in which you may create files."
        ) from error


def use_stored_parts(model: Any, files: dict[str, Path], base_samples: dict[str, dict] | None = None) -> None:
    """Lets saves of a quantized `model` copy `files`, by their place in its folder: they hold what it consists of.

    `base_samples` are those of a base that takes the place of the model's own (`tensor_samples`).
    """
    model._quantized_files = files
    if base_samples is not None:
        model._base_samples = base_samples


def refuse_foreign_folder(target: Path) -> None:
    """`ValueError` where a save would destroy another model, above all the base's own folder."""
    config_file = target / "config.json"
    if os.path.isfile(config_file):
        model_type = read_settings(config_file).get("model_type")
        if model_type != "genieblue":
            raise ValueError(
                f"{target} holds a model of type {model_type!r}, which this save would replace: give another folder."
            )
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} is the folder you are working in and cannot be replaced: save into another one.")


def _inner_base(folder: Path) -> list[str]:
    """The subfolder in which a quantized model that was saved into `folder` has its base, if it has one."""
    config_file = folder / "config.json"
    config = read_settings(config_file) if config_file.is_file() else {}
    name = config.get("base_model_name_or_path")
    is_ours = config.get("quantization") is not None and isinstance(name, str) and is_inner_folder(name)
    return [name.removeprefix("./")] if is_ours else []


def _usual_modes(folder: Path) -> tuple[int, int]:
    """The modes that new files and new folders get; asking the process for its umask would change it for a moment."""
    file, inner = folder / ".file", folder / ".folder"
    file.touch()
    inner.mkdir()
    modes = file.stat().st_mode & 0o777, inner.stat().st_mode & 0o777
    file.unlink()
    inner.rmdir()
    return modes


def _write_files(
    model: Any,
    staging: Path,
    target: Path,
    processor: Any,
    dtype: torch.dtype | None,
    facts: dict[str, Any] | None,
) -> bool:
    """Writes all files into `staging`; returns whether a processor is among them."""
    quantized = model.config.quantization
    if quantized is not None:
        dtype = getattr(torch, quantized["activations"])
        for name, source in model._quantized_files.items():  # byte for byte: what is in memory is packed for a kernel
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / name)
    else:
        dtype = dtype or next(model.multi_modal_projector.parameters()).dtype
        _write_own_weights(model, staging, dtype)
        save_adapter(model.multimodal_language_model, staging / ADAPTER_FOLDER, dtype)
    config = _config_to_save(model, target, dtype)
    config.save_pretrained(staging)
    # Not by its `save_pretrained`, which refuses the flags that some published bases come with.
    model.generation_config.to_json_file(staging / "generation_config.json")
    lora_config = copy.deepcopy(model._lora_config)
    lora_config.base_model_name_or_path = config.base_model_name_or_path
    lora_config.revision = config.base_model_revision
    save_adapter_config(lora_config, staging / ADAPTER_FOLDER)
    _write_samples(model._base_samples, staging / BASE_FINGERPRINT_NAME)
    for source in sorted(Path(__file__).parent.glob("*_genieblue.py")):
        shutil.copyfile(source, staging / source.name)
    processor = processor or _own_processor(model)
    if processor is not None:
        processor.save_pretrained(staging)
    for name, content in {**_own_facts(model), **(facts or {})}.items():
        (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_card(staging, target)
    return processor is not None


def _write_own_weights(model: Any, staging: Path, dtype: torch.dtype) -> None:
    state = {
        f"{part}.{name}": value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for part in OWN_MODULES
        for name, value in getattr(model, part).state_dict().items()
    }
    save_file(state, staging / WEIGHTS_NAME, metadata={"format": "pt"})


def _config_to_save(model: Any, target: Path, dtype: torch.dtype) -> Any:
    """Configuration with the code map, the base's file hashes, and a local base as a path relative to `target`."""
    name, revision = model.config.base_model_name_or_path, model.config.base_model_revision
    if name is None:
        logger.warning("This GenieBlue does not say where its base is: `base_model=` will be needed to load it.")
    elif model.config.base_model_fingerprint is None:
        model.config.base_model_fingerprint = weight_file_hashes(name, revision, **model._hub_kwargs) or None
        if model.config.base_model_fingerprint is None:
            logger.warning("The weight files of %s are not on this computer: their sha256 is not recorded.", name)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("use_cache", None)  # put there by Trainer, for the training
    for part in (config.text_config, config.vision_config):
        if os.path.exists(getattr(part, "_name_or_path", None) or ""):
            part.name_or_path = ""  # a path of this computer is nobody else's business
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [type(model).__name__]
    config.dtype = config.vision_config.dtype = dtype
    if name is not None and os.path.isabs(name):
        relative = os.path.relpath(name, target)
        config.base_model_name_or_path = relative if relative.startswith(".") else os.path.join(".", relative)
    return config


def _write_samples(samples: dict[str, dict], path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(sample)}" for name, sample in samples.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _own_processor(model: Any) -> Any:
    """The processor that came with the model, or one made from the tokenizer of its base.

    `None` if there is none, or if the model's own cannot be read: one with other settings must not take its place.
    """
    request = getattr(model, "_source", None)
    try:
        if request is not None and not os.path.exists(request.path) and request.path.count("/") != 1:
            logger.warning("%s is gone: the processor is made anew, from the base's tokenizer.", request.path)
        elif request is not None and any(request.file(name, required=False) for name in PROCESSOR_SETTINGS):
            trust = bool(request.base_kwargs.get("trust_remote_code"))
            return GenieBlueProcessor.from_pretrained(request.path, trust_remote_code=trust, **request.hub_kwargs)
        if model.config.base_model_name_or_path is not None:
            tokenizer = AutoTokenizer.from_pretrained(
                model.config.base_model_name_or_path,
                revision=model.config.base_model_revision,
                trust_remote_code=model.language_model.is_remote_code(),  # then its code was allowed to run already
                **model._hub_kwargs,
            )
            return GenieBlueProcessor.from_base(
                tokenizer,
                image_token_id=model.config.image_token_id,
                image_seq_length=model.config.image_seq_length,
                tile_size=model.config.vision_config.image_size,
            )
    except (OSError, ValueError) as error:
        logger.warning("No processor is saved (%s): pass `processor=` to `save_pretrained`.", error)
    return None


def _own_facts(model: Any) -> dict[str, Any]:
    """How the model was trained before it was loaded; what was measured then holds as long as it is quantized.

    Other weights may have been trained since; quantized ones cannot.
    """
    request = getattr(model, "_source", None)
    facts = {}
    for name in (RECIPE_NAME, MEASUREMENTS_NAME) if model.config.quantization is not None else (RECIPE_NAME,):
        try:
            path = None if request is None else request.file(name, required=False)
        except (OSError, ValueError) as error:  # the folder it was loaded from may be gone
            logger.info("No %s of %s: %s", name, request.path, error)
            continue
        if path is not None:
            facts[name] = json.loads(Path(path).read_text(encoding="utf-8"))
    return facts


def _write_card(folder: Path, target: Path) -> None:
    """The card that `target` has if somebody wrote or edited it, otherwise one that is rendered from the new files."""
    existing = target / "README.md"
    try:
        from hub_cards.model_card import card_info_from_folder, is_as_generated, write_model_card
    except ModuleNotFoundError as error:  # running as remote code, without the package that renders cards
        if error.name != "hub_cards":
            raise
        logger.info("The package `genieblue` is not installed: no model card is rendered.")
        if existing.is_file():
            shutil.copyfile(existing, folder / "README.md")
        return
    if existing.is_file() and not is_as_generated(existing.read_text(encoding="utf-8")):
        shutil.copyfile(existing, folder / "README.md")
    else:
        write_model_card(folder, card_info_from_folder(folder, repo_name=target.name))


def _put_in_place(staging: Path, target: Path, stale_names: tuple[str, ...]) -> None:
    """Swaps the finished folder in; foreign files of the old one (checkpoints, notes) move over.

    A process that is killed between the two renames leaves the old folder, whole, as `.<name>.old-…` beside it.
    """
    if not target.exists():
        os.rename(staging, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:SHORT_NAME]}.old-"))
    try:
        os.rename(target, old)
    except OSError as error:
        old.rmdir()
        raise OSError(f"{target} cannot be replaced ({error}): give a folder inside of it instead.") from error
    moved: list[Path] = []  # foreign files, as paths in the folder
    try:
        os.rename(staging, target)
        for folder in (ADAPTER_FOLDER, "."):
            for entry in list((old / folder).iterdir()) if (old / folder).is_dir() else ():
                is_stale = any(fnmatchcase(entry.name, pattern) for pattern in stale_names)
                if not is_stale and not (target / folder / entry.name).exists():
                    os.rename(entry, target / folder / entry.name)
                    moved.append(Path(folder, entry.name))
    except BaseException:
        for path in moved:
            os.rename(target / path, old / path)
        if target.exists():
            os.rename(target, staging)
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the save is done, whatever is left of the old folder


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
    create_pr: bool = False,
) -> Any:
    """Saves into a temporary folder and uploads it as one commit; see `push_to_hub` of the model."""
    name = model.config.base_model_name_or_path
    goes_along = model.config.quantization is not None and is_inner_folder(name)
    if not goes_along and (name is None or is_local_reference(name) or model.config.base_model_revision is None):
        raise ValueError(
            f"The base is recorded as {name!r} at {model.config.base_model_revision!r}; others can only load this "
            "GenieBlue if its base is on the Hub: make it with `base_model_name_or_path` (Hub id) and "
            "`base_model_revision` (commit)."
        )
    commit = {
        "token": token, "private": private, "revision": revision, "create_pr": create_pr,
        "commit_message": commit_message or "Upload GenieBlue",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, repo_id.rsplit("/", 1)[-1])
        model.save_pretrained(folder, processor=processor, dtype=dtype)
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


__all__ = ["push_model", "refuse_foreign_folder", "save_model", "use_stored_parts"]
