"""Creates the folder of a new GenieBlue from a base LLM and a SigLIP."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from conversion.chat_ids import NO_STOP_TOKEN, answer_frame, stop_token_ids
from conversion.chat_template import QUESTION, check_chat_template
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueImageProcessor, GenieBlueProcessor
from modeling_genieblue.addresses_genieblue import refuse_address
from modeling_genieblue.arguments_genieblue import SIGLIP_TYPES
from modeling_genieblue.base_loading_genieblue import check_base_type, check_complete
from modeling_genieblue.configuration_genieblue import select_replicated_layers
from modeling_genieblue.language_adapter_genieblue import tensors_of_other_kinds
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_FOLDER,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MODEL_TYPE,
    ModelFiles,
    check_folder_or_id,
    check_settings_files,
    read_settings,
    weight_files,
)
from modeling_genieblue.saving_genieblue import processor_for, save_model

logger = logging.getLogger(__name__)

# Report weights of the wrong shape by name, instead of with transformers' RuntimeError.
WEIGHT_OPTIONS = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def create_genieblue(
    base: str | os.PathLike,
    vision: str | os.PathLike,
    output: str | os.PathLike,
    *,
    placement: str = "skip",
    lora_rank: int = 8,
    lora_alpha: int = 16,
    structure: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None,
    adapt: Callable[[GenieBlueForConditionalGeneration], None] | None = None,
    max_tiles: int = 16,
    image_prefix: str = "",
    image_suffix: str = "",
    chat_template: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    base_revision: str | None = None,
    vision_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes an untrained GenieBlue, whose two views give equal results, to the folder `output` and returns it.

    Args:
        base: folder or Hub id of a decoder with at least four blocks; recorded as a relative path, or with its commit.
        vision: folder or Hub id of a SigLIP: the complete model or its vision half.
        placement: which quarter of the blocks is replicated: `skip`, `pre` or `post`.
        structure: called with the loaded base, gives arguments of `from_base` about the adapter instead of these.
        adapt: called with the new model before it is saved, to fill its adapter.
        max_tiles: square number; an image is cut into at most this many tiles, plus a thumbnail.
        image_prefix, image_suffix: texts before and behind each tile.
        chat_template: Jinja text for a base whose tokenizer has none.
        dtype: `"auto"` is the base's dtype; the vision tower gets the same.
        trust_remote_code: allows code from the base's repository to run.
        overwrite: allows `output` to be an existing GenieBlue; other files in it are kept.

    Raises `ValueError` or `OSError`, before reading any weights, for an existing output, a base or vision model of the
    wrong kind, a failing chat template, and settings out of range. Only safetensors files are read.
    """
    base, vision, output = os.fspath(base), os.fspath(vision), Path(output)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    from_base = {**hub, "revision": base_revision, "trust_remote_code": trust_remote_code}
    from_vision = {**hub, "revision": vision_revision}
    _check_output(output, (base, vision), overwrite)
    _check_settings(lora_rank, lora_alpha, max_tiles)
    check_base_config(base, placement, **from_base)
    vision_config = load_vision_config(vision, **from_vision)
    tokenizer = load_part("base's tokenizer", base, AutoTokenizer.from_pretrained, **from_base)
    _check_chat_template(tokenizer, base, chat_template)

    base_model = load_base_model(base, dtype=dtype, **from_base).to(device)
    adapter: dict[str, Any] = {"placement": placement, "lora_rank": lora_rank, "lora_alpha": lora_alpha}
    model = GenieBlueForConditionalGeneration.from_base(
        base_model,
        _load_vision_tower(vision, vision_config, dtype=base_model.dtype, **from_vision).to(device),
        **(adapter if structure is None else structure(base_model)),
        base_model_name_or_path=base,
        base_model_revision=base_revision,
        hub_kwargs=hub,
    )
    if adapt is not None:
        adapt(model)
    processor = processor_for(
        model.config,
        tokenizer,
        max_tiles=max_tiles,
        image_prefix=image_prefix,
        image_suffix=image_suffix,
        chat_template=chat_template,
    )
    _report_stop_tokens(processor, model.generation_config)

    save_model(model, output, processor=processor, replace=overwrite)
    if foreign := sorted(path.name for path in output.iterdir() if path.is_dir() and path.name != ADAPTER_FOLDER):
        logger.warning("%s still contains %s, which are not part of the new model.", output, ", ".join(foreign))
    return output


def _report_stop_tokens(processor: GenieBlueProcessor, generation_config: GenerationConfig) -> None:
    """Warns if the base's generation never stops, or not at the end of its chat template's turns."""
    stop_ids = stop_token_ids(generation_config)
    if processor.chat_template is None:
        return
    if not stop_ids:
        logger.warning(NO_STOP_TOKEN)
        return
    stops = " or ".join(repr(token) for token in processor.tokenizer.convert_ids_to_tokens(stop_ids))
    messages = [{"role": "user", "content": QUESTION}]
    try:
        _, after = answer_frame(processor, messages)
    except ValueError as error:
        logger.warning("No chat can be trained: %s", error)
        return
    if not set(processor.tokenizer(after, add_special_tokens=False)["input_ids"]) & set(stop_ids):
        logger.warning(
            "Generation stops at %s, but the chat template ends an answer with %r. Trained answers end with both; the "
            "base's own answers to text continue past the template's end, as before.",
            stops,
            after.rstrip(),
        )
    else:
        logger.info("Generation stops at %s, which also ends the chat template's answers.", stops)


def _check_output(output: Path, sources: tuple[str, ...], overwrite: bool) -> None:
    for source in sources:
        if os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(output):
            raise ValueError(f"{output} is also an input: give another output folder.")
    if output.exists() and not output.is_dir():
        raise OSError(f"{output} is a file: give a folder that is new or empty.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OSError(f"{output} is not empty: give a new folder, or pass overwrite (--overwrite) to replace it.")
    config = output / CONFIG_NAME
    if not config.is_file() or read_settings(config).get("model_type") != MODEL_TYPE:
        raise OSError(
            f"{output} contains something other than a GenieBlue, which is never overwritten: give a new folder."
        )


def _check_settings(lora_rank: int, lora_alpha: int, max_tiles: int) -> None:
    if lora_rank < 1 or lora_alpha < 1:
        raise ValueError(f"Got LoRA rank {lora_rank} and alpha {lora_alpha}: expected at least 1 for both.")
    GenieBlueImageProcessor(max_tiles=max_tiles)  # raises unless it is a square number


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, base: str, chat_template: str | None) -> None:
    """`ValueError` for a template that fails, or that would replace the base's own."""
    if chat_template is not None and tokenizer.chat_template is not None:
        raise ValueError(
            f"The tokenizer of {base} already has a chat template, which a GenieBlue keeps: leave out yours."
        )
    if chat_template is not None:
        check_chat_template(tokenizer, chat_template, "The given chat template (--chat-template)")
    elif tokenizer.chat_template is not None:
        check_chat_template(tokenizer, None, f"The chat template of {base}")
    else:
        logger.warning(
            "%s has no chat template, so it can neither chat nor be trained on chats: give one with `chat_template` "
            "(--chat-template FILE).",
            base,
        )


def load_part(what: str, name: str, from_pretrained: Any, *, never_runs_code: bool = False, **kwargs: Any) -> Any:
    """`from_pretrained(name, …)`, with errors that name what was being loaded.

    With `never_runs_code` nobody can allow code from its repository.
    """
    refuse_address(name, f"The {what}")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if never_runs_code:
        kwargs["trust_remote_code"] = False  # without a value transformers asks at the terminal
    try:
        return from_pretrained(name, **kwargs)
    except SafetensorError as error:
        raise OSError(f"The weights of {name} cannot be read ({error}): fetch or save them again.") from error
    except KeyError as error:  # such as an index without its metadata
        raise OSError(f"A file of the {what} {name} has no {error}: it is damaged; fetch it again.") from error
    except ImportError as error:
        raise OSError(f"The {what} {name} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, HFValidationError) as error:
        check_folder_or_id(name, f"The {what} ")
        if "trust_remote_code" in str(error) and never_runs_code:
            raise ValueError(
                f"The {what} {name} needs Python code from its repository, which GenieBlue never runs: take the "
                "repository that transformers itself loads (of a VLM it is often named -hf)."
            ) from error
        if "trust_remote_code" in str(error) and not kwargs.get("trust_remote_code"):
            raise ValueError(
                f"The {what} {name} needs Python code from its repository. Read that code and, if you trust it, "
                "allow it with trust_remote_code (--trust-remote-code)."
            ) from error
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"The {what} {name} could not be loaded: {error}") from error


def check_numbers(what: str, name: str, model: PreTrainedModel, *, renamed: bool = False, **hub: Any) -> None:
    """`ValueError` for weights stored as integers or in 8 bits, which transformers would cast, or that contain NaN or
    infinity; `renamed` if the files' names need not be those of `model`, as with many VLMs."""
    parameters = dict(model.named_parameters())
    leaves = {key.rpartition(".")[2] for key in parameters}

    def is_weight(key: str) -> bool:
        """Whether it is none of the integer masks and positions that a file may also contain."""
        if renamed:
            return key.rpartition(".")[2] in leaves
        return key in parameters or key.partition(".")[2] in parameters  # with one more module as a prefix

    problems = []
    for path in weight_files(ModelFiles(name, **hub).cached).values():
        with safe_open(path, framework="pt") as file:
            weights = [key for key in file.keys() if is_weight(key)]
            problems += tensors_of_other_kinds(file, weights)
    problems = problems or [f"{key} contains NaN or infinity" for key in not_finite_parameters(model)]
    if problems:
        raise ValueError(
            f"The weights of the {what} {name} cannot be used, {len(problems)} in all: {'; '.join(problems[:3])}. "
            "Fetch them again, or convert them to floating-point numbers."
        )


def not_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that contain NaN or infinity."""
    return [
        name
        for name, parameter in model.named_parameters()
        # The bounds are NaN if any value is, and need no second tensor.
        if parameter.numel() and not all(bound.isfinite() for bound in parameter.detach().aminmax())
    ]


def check_weight_files(name: str, config: PreTrainedConfig, remedy: str) -> None:
    """`ValueError` for quantized weights, with the `remedy`, and `OSError` for a folder without safetensors files or
    with a missing shard; before any weights are read."""
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        raise ValueError(f"The weights of {name} are quantized, {remedy}")
    if os.path.isdir(name) and not weight_files(ModelFiles(name).find):
        raise FileNotFoundError(
            f"{name} has no safetensors files: only these are read. Convert its weights, or fetch it again."
        )


def check_base_config(base: str, placement: str, *, trust_remote_code: bool = False, **hub: Any) -> None:
    """`ValueError` for an unsuitable base, after reading only its configuration."""
    config = load_part("base", base, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code, **hub)
    check_base_type(base, config)
    remedy = (
        "so no block can be replicated for training: give the base in 16 or 32 bits. A trained GenieBlue also loads "
        "onto a quantized base."
    )
    check_weight_files(base, config, remedy)
    select_replicated_layers(config.get_text_config(decoder=True).num_hidden_layers, placement)
    check_settings_files(base, {GENERATION_CONFIG_NAME: None}, **hub)


def load_base_model(base: str, *, dtype: str | torch.dtype, trust_remote_code: bool, **hub: Any) -> PreTrainedModel:
    """Loads the base and checks that it is complete and finite."""
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **hub, **WEIGHT_OPTIONS}
    base_model, info = load_part("base", base, AutoModelForCausalLM.from_pretrained, **options)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise ValueError(
            f"{name} of {base} has shape {list(found)}, but its config.json gives {list(expected)}: fetch both "
            "from the same revision."
        )
    check_complete(base, info)
    check_numbers("base", base, base_model, **hub)
    return base_model


def load_vision_config(vision: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a SigLIP's vision half; `ValueError` or `OSError` for another model, or none."""
    config = load_part("vision model", vision, AutoConfig.from_pretrained, never_runs_code=True, **kwargs)
    if config.model_type not in SIGLIP_TYPES:
        raise ValueError(
            f"{vision} has model_type {config.model_type!r}: expected a SigLIP ({' or '.join(SIGLIP_TYPES)}), such as "
            "google/siglip-so400m-patch14-384."
        )
    return getattr(config, "vision_config", config)


def _load_vision_tower(vision: str, config: PreTrainedConfig, *, dtype: torch.dtype, **hub: Any) -> SiglipVisionModel:
    """Loads the vision half of a SigLIP and checks that it is complete and finite."""
    options = {"config": config, "dtype": dtype, **hub, **WEIGHT_OPTIONS}
    # A complete SigLIP also has a text half, whose weights transformers would report as unexpected one by one.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = load_part("vision model", vision, SiglipVisionModel.from_pretrained, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"The weights of {vision} lack {lacking[:3]} ({len(lacking)} tensors in all), or have them in the wrong "
            "shape: expected a complete SigLIP vision tower."
        )
    check_numbers("vision model", vision, model, **hub)
    return model
