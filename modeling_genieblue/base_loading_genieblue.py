"""Finds and loads the base of a GenieBlue, and checks that it is the recorded one."""

import logging
import os
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .addresses_genieblue import refuse_address
from .base_identity_genieblue import cached_commits, compare_with_samples, different_settings
from .hints_genieblue import ACCEPT_BASE, GIVE_BASE, BaseNotFoundError, WrongBaseError
from .loading_genieblue import LoadRequest, hub_commit
from .model_files_genieblue import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    HUB_KEYS,
    MODEL_TYPE,
    ModelFiles,
    cached_sha256,
    check_settings_files,
    is_inner_folder,
    is_path,
    read_settings,
)

logger = logging.getLogger(__name__)

# Loaders of bases by `quant_method`, for methods unknown to transformers; the files that define them register them.
BASE_LOADERS: dict[str, Callable[..., PreTrainedModel]] = {}


def resolve_base(
    base: PreTrainedModel, name: str | None, revision: str | None, hub_kwargs: dict[str, Any] | None = None
) -> tuple[str | None, str | None]:
    """The location of a loaded base: (Hub id, commit) or (absolute folder, None).

    A loaded model does not remember its commit. Without `revision`, it is the commit in the local cache with the same
    weights. A base that was not loaded from anywhere gives (None, None).
    """
    name = name or getattr(base.config, "_name_or_path", None) or None
    refuse_address(name, "The base")
    if name is None or os.path.isdir(name):
        return (None if name is None else os.path.realpath(name)), None
    if revision is not None and len(revision) == 40:
        return name, revision
    hub_kwargs = hub_kwargs or {}
    wanted = hub_commit(name, revision, **hub_kwargs)
    commits = {} if revision is not None else cached_commits(base, name, hub_kwargs.get("cache_dir"))
    if wanted is not None and commits.get(wanted, not commits):
        return name, wanted
    if same := [commit for commit, is_same in commits.items() if is_same]:
        return name, same[0]
    logger.warning("The commit of the base %s is unknown: pass it as `base_model_revision` to publish.", name)
    return name, None


def load_base(config: Any, request: LoadRequest, override: str | os.PathLike | None) -> PreTrainedModel:
    """Loads the base named in `config` (or `override`) with `AutoModelForCausalLM`, like any user would."""
    location = os.fspath(override) if override is not None else request.base_location(config)
    if location is None:
        raise WrongBaseError(f"{request.path} does not record its base.", GIVE_BASE)
    is_recorded = override is None or location == config.base_model_name_or_path
    kwargs = dict(request.base_kwargs)
    # A base that transformers knows needs no `trust_remote_code`, even if the user gave it for our code.
    needs_code = config.base_model_runs_remote_code or not is_recorded
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code")) and needs_code
    if is_path(location):
        if not os.path.isdir(location):
            raise BaseNotFoundError(
                f"The base of {request.path} should be in {location}, but that folder does not exist: put it there.",
                GIVE_BASE,
            )
    elif is_recorded and config.base_model_revision is not None:
        kwargs["revision"] = config.base_model_revision
    try:
        where = {key: kwargs[key] for key in HUB_KEYS if key in kwargs}
        config_file = cached_file(location, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
        settings = {} if config_file is None else read_settings(config_file)
        # `AutoModelForCausalLM` also loads a GenieBlue, whose base might even be itself.
        _check_no_genieblue(location, settings.get("model_type"))
        quantization = settings.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        check_settings_files(location, {GENERATION_CONFIG_NAME: None}, **where)
        if isinstance(method, str) and method in BASE_LOADERS:
            base, info = BASE_LOADERS[method](location, **kwargs), {}
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location, use_safetensors=True, output_loading_info=True, **kwargs
            )
            base, info = loaded
    except SafetensorError as error:
        raise OSError(f"The weights of the base {location} cannot be read ({error}): fetch them again.") from error
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):  # followed by all known classes
            check_base_type(location, AutoConfig.from_pretrained(location, **where))
        if "trust_remote_code" in str(error) and not request.base_kwargs.get("trust_remote_code"):
            raise ValueError(
                f"The base {location} of {request.path} needs Python code from its repository. Read that code and, if "
                "you trust it, pass `trust_remote_code=True`."
            ) from error
        kind = WrongBaseError if isinstance(error, ValueError) else BaseNotFoundError
        raise kind(f"The base {location} of {request.path} could not be loaded: {error}\n", GIVE_BASE) from error
    check_complete(location, info)
    if "revision" in kwargs:
        _check_cached_files(location, config, kwargs)
    return base


def check_base_type(location: str, config: PreTrainedConfig) -> None:
    """`ValueError` unless `config`, that of `location`, is of a model that can be a base."""
    _check_no_genieblue(location, config.model_type)
    num_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = has_code or type(config) in AutoModelForCausalLM._model_mapping
    if num_blocks is None or not is_causal or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{location} has model_type {config.model_type!r}: expected a decoder-only language model that "
            "`AutoModelForCausalLM` loads, such as a Llama or a Qwen."
        )


def _check_no_genieblue(location: str, model_type: str | None) -> None:
    if model_type == MODEL_TYPE:
        raise ValueError(f"{location} is already a GenieBlue: give the language model to make one from.")


def check_complete(location: str, loading_info: dict[str, Any], what: str = "base") -> None:
    """`ValueError` if weights are missing from a model's files: transformers would initialise them randomly."""
    missing = sorted(map(str, [*loading_info.get("missing_keys", ()), *loading_info.get("mismatched_keys", ())]))
    if missing:
        raise ValueError(
            f"The {what} {location} is incomplete: {len(missing)} tensors are missing or have the wrong shape, "
            f"including {', '.join(missing[:3])}. Fetch it again."
        )


def _check_cached_files(location: str, config: Any, kwargs: dict[str, Any]) -> None:
    """Compares the recorded sha256 with the names of files in the Hub cache, without reading them."""
    files = ModelFiles(location, **{key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs})
    for name, recorded in sorted((config.base_model_fingerprint or {}).items()):
        path = files.cached(name)
        found = recorded if path is None else cached_sha256(path) or recorded
        if found != recorded:
            raise WrongBaseError(
                f"{location} at {kwargs['revision']} is not the recorded base: sha256 of {name} is {found}, expected "
                f"{recorded}.",
                GIVE_BASE,
            )


def check_identity(
    base: PreTrainedModel,
    config: Any,
    samples: dict[str, dict],
    request: LoadRequest,
    values: dict[str, Any] | None = None,
) -> None:
    """`ValueError` with both identities if `base` is not the base that the adapter was trained for.

    `values` as for `compare_with_samples`.
    """
    differences = [*compare_with_samples(base, samples, values), *different_settings(base.config, config.text_config)]
    if differences:
        recorded = request.base_location(config, required=False) or config.base_model_name_or_path
        at = f" at {config.base_model_revision}" if config.base_model_revision else ""
        raise WrongBaseError(
            f"{getattr(base.config, '_name_or_path', '') or type(base).__name__} is not the base that {request.path} "
            f"was made for, {recorded}{at}: {'; '.join(differences[:3])}"
            f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}.",
            GIVE_BASE,
            ACCEPT_BASE,
        )


def record_location(config: Any, request: LoadRequest, base: PreTrainedModel, given: Any) -> None:
    """Records in `config` where the base can be found again: the recorded location, else that of the given base.

    A recorded path that does not exist here is useless once a base was given.
    """
    if is_inner_folder(config.base_model_name_or_path):
        return
    location = request.base_location(config, required=given is None)
    is_gone = location is None or is_path(location) and not os.path.isdir(location)
    if given is not None and is_gone:
        name = os.fspath(given) if isinstance(given, str | os.PathLike) else None
        location, config.base_model_revision = resolve_base(base, name, None, request.access())
    config.base_model_name_or_path = location
