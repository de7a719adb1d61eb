"""The multimodal language side of a GenieBlue as one dense language model of the base's own architecture."""

import copy
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from conversion.language_exports import (
    LARGEST_ERROR,
    LogitsGauge,
    embed_requests,
    export_facts,
    load_source,
)
from conversion.quantization.bases import COMPANIONS, base_folder
from conversion.quantization.views import vlm_of
from conversion.staging import CONVERSION, explained_full_disk, lock_output
from hub_cards.exports import EXPORT_FACTS_NAME, write_export_card
from hub_cards.model_card import Measurement
from modeling_genieblue.language_adapter_genieblue import ADAPTER
from modeling_genieblue.model_files_genieblue import GENERATION_CONFIG_NAME, LICENSE_FILES, VLM_FOLDER, write_json
from modeling_genieblue.staging_genieblue import NewFolder
from modeling_genieblue.vlm_language_genieblue import OwnRows


@dataclass(frozen=True)
class MergedModel:
    """What was written: the folder, bytes of the weights, and the error of its logits."""

    output: Path
    bytes: int
    measurements: list[Measurement]


def export_merged(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    **load_kwargs: Any,
) -> MergedModel:
    """Writes the multimodal view of a GenieBlue (folder or Hub id) as a plain checkpoint of its base's architecture.

    LoRA is merged in float32 and cast to the dtype of the base, or to `dtype`. What was written is loaded again, and
    its logits compared with the view's. Of a VLM it is that one's language model, with its settings and tokenizer.

    Args:
        calibration: chats as encoded by the model's processor, on which the logits are compared.
        load_kwargs: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises `ValueError` or `OSError`, leaving nothing behind, for a model that cannot be exported (see `load_source`),
    an output that exists, and a result that does not load or gives other logits.
    """
    model, out = load_source(source, out, **load_kwargs)
    base, config, vlm = model.language_model, model.config, vlm_of(model)
    gauge = LogitsGauge(model, embed_requests(model, calibration), calibration is not None)
    access = model.provenance.access
    with lock_output(out, CONVERSION), explained_full_disk(out), NewFolder(out, "export", replace=False) as new:
        plain, state = _merged_base(model) if vlm is None else _merged_vlm(model)
        settings = (vlm or base).generation_config
        plain.generation_config = GenerationConfig()  # its `save_pretrained` refuses what some bases come with
        plain.save_pretrained(new.staging, state_dict=state)
        settings.to_json_file(new.staging / GENERATION_CONFIG_NAME)
        origin = base_folder(config.base_model_name_or_path, config.base_model_revision, access)
        _copy_companions(origin, new.staging, COMPANIONS if vlm is None else LICENSE_FILES)
        if vlm is not None:
            _save_tokenizer(model, new.staging)
        merged = AutoModelForCausalLM.from_pretrained(
            new.staging, dtype=base.dtype, use_safetensors=True, trust_remote_code=base.is_remote_code()
        )
        error, row = gauge.measure("Logits of this model", merged.eval().to(base.device))
        if not error <= LARGEST_ERROR[base.dtype]:
            raise ValueError(
                f"The merged model's logits differ from the multimodal view's by {error:.2g} of their size, more than "
                f"{LARGEST_ERROR[base.dtype]:g}: {type(base).__name__} cannot be merged. Use `genieblue export lora`."
            )
        facts = export_facts("merged", model, out, [row])
        write_json(new.staging / EXPORT_FACTS_NAME, facts)
        write_export_card(new.staging, out.name, base_folder=origin)
        size = sum(path.stat().st_size for path in new.staging.glob("*.safetensors"))
        new.put_in_place()
    return MergedModel(out, size, [row])


def _merged_base(model: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The base, and the merged weights in its place."""
    return model.language_model, merged_state(model.language_model, model.multimodal_language_model)


@torch.no_grad()
def _merged_vlm(model: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A language model without memory that has the settings of the VLM's, and that one's weights."""
    base, view, own = model.language_model, model.multimodal_language_model, model.own_language
    settings = copy.deepcopy(model.vlm.config.get_text_config())
    settings.tie_word_embeddings = is_tied = model.config.own_head_rows is None
    with init_empty_weights():
        plain = AutoModelForCausalLM.from_config(settings, dtype=base.dtype)
    state = merged_state(base, view)
    paths = {id(module): name for name, module in base.named_modules()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = [f"{paths[id(module)]}.weight" for module in (embedding, head)]
    state[names[0]] = _with_rows(embedding.weight, own.embedding, settings.vocab_size)
    state[names[1]] = state[names[0]] if is_tied else _with_rows(head.weight, own.head, settings.vocab_size)
    return plain, state


def _with_rows(weight: torch.Tensor, own: OwnRows | None, count: int) -> torch.Tensor:
    """The base's embedding or head with the rows of a VLM's own in their places, (count, hidden_size)."""
    rows = weight.detach()[:count]
    rows = nn.functional.pad(rows, (0, 0, 0, count - len(rows)))  # all of these are its own
    return rows.clone() if own is None else rows.index_copy(0, own.indices, own.weight.detach().to(rows.dtype))


def _save_tokenizer(model: Any, folder: Path) -> None:
    """The VLM's, whose language model this is, with its chat template."""
    source = model.provenance.source
    where = {"subfolder": VLM_FOLDER, "trust_remote_code": False, **source.hub_kwargs}
    tokenizer = AutoTokenizer.from_pretrained(source.path, **where)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def merged_state(base: nn.Module, view: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the base with the view's copies and with its LoRA merged; in the base's dtype, new tensors.

    Tensors that the base shares between two names stay shared.
    """
    modules = dict(view.named_modules())
    state: dict[str, torch.Tensor] = {}
    merged: dict[int, torch.Tensor] = {}
    for name, value in base.state_dict(keep_vars=True).items():
        if id(value) not in merged:
            merged[id(value)] = merged_tensor(name, value, modules)
        state[name] = merged[id(value)]
    return state


def merged_tensor(name: str, value: torch.Tensor, modules: Mapping[str, nn.Module]) -> torch.Tensor:
    """A tensor of the base with its copy in its place or its LoRA merged; `modules` are those of the adapted tree."""
    owner, _, leaf = name.rpartition(".")
    parts = owner.split(".")
    for end in range(len(parts), 0, -1):
        wrapper: Any = modules.get(".".join(parts[:end]))
        if hasattr(wrapper, "modules_to_save") and ADAPTER in wrapper.modules_to_save:
            inner = ".".join([*parts[end:], leaf])
            return wrapper.modules_to_save[ADAPTER].state_dict()[inner].to(value.dtype)
    layer: Any = modules.get(owner)
    if leaf == "weight" and hasattr(layer, "lora_A"):
        return (value.float() + layer.get_delta_weight(ADAPTER).float()).to(value.dtype)
    return getattr(getattr(layer, "base_layer", layer), leaf).detach()  # a VLM's norms and biases may be its own


def _copy_companions(origin: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Files of the base: tokenizer, licence and code."""
    for path in sorted(origin.iterdir()):
        is_companion = any(fnmatchcase(path.name, pattern) for pattern in patterns)
        if path.is_file() and is_companion and path.name != GENERATION_CONFIG_NAME:
            shutil.copyfile(path, folder / path.name)
