"""Puts a GenieBlue on another revision of its base, if what its multimodal view shares with the base is the same."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from conversion.create import check_weight_files, load_base_model, load_part
from conversion.language_exports import check_new_folder
from conversion.quantization.bases import check_source
from conversion.unchanged import check_unchanged
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, VlmGenieBlueConfig
from modeling_genieblue.base_identity_genieblue import different_settings, tensor_samples
from modeling_genieblue.base_loading_genieblue import check_base_type, load_base, resolve_base
from modeling_genieblue.language_adapter_genieblue import find_blocks
from modeling_genieblue.loading_genieblue import LoadRequest, hub_commit
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    HUB_KEYS,
    SHARED_HUB_KEYS,
    ModelFiles,
    check_folder_or_id,
    file_sha256,
    read_settings,
    some,
    with_siblings,
)
from modeling_genieblue.saving_genieblue import save_model


@dataclass(frozen=True)
class Stacked:
    """What was written: the folder, the new base with its commit, and its changed tensors, which only text runs."""

    output: Path
    base: str
    revision: str | None
    changed: list[str]


def stack_on(
    source: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Stacked:
    """Writes a copy of the GenieBlue `source` that stands on `base`, a newer revision of its own base.

    The multimodal view does not change: it uses all of the base but the blocks that it has copies of and, of a VLM,
    what is the VLM's own. So these may differ, and nothing else. Text then runs the new base, with its tokenizer and
    template.

    Args:
        base: folder or Hub id of the new base.
        base_revision: branch, tag or commit of it.
        hub_kwargs: how `source` is loaded (`token`, `revision`, `cache_dir`, …).

    Raises `ValueError` that names them if other tensors, settings, the base's own code or the vocabulary differ, and
    `ValueError` or `OSError` for a quantized GenieBlue, a missing or incomplete base, and an output that exists.
    """
    hub = {key: value for key, value in hub_kwargs.items() if key in HUB_KEYS and value is not None}
    request = LoadRequest.from_arguments(source, {**hub, "trust_remote_code": trust_remote_code})
    request.check_layout()
    config = GenieBlueConfig.from_pretrained(source, **hub)
    check_source(source, config)
    check_folder_or_id(base, "The base ")
    is_local = os.path.isdir(base)
    access = {key: hub[key] for key in SHARED_HUB_KEYS if key in hub}
    location: dict[str, Any] = {"trust_remote_code": trust_remote_code, **access}
    if not is_local:  # all files are of one commit
        location["revision"] = hub_commit(str(base), base_revision, newest=True, **access) or base_revision
    out = check_new_folder(out, [source, base])

    base_config = load_part("base", os.fspath(base), AutoConfig.from_pretrained, **location)
    check_base_type(os.fspath(base), base_config)
    check_unchanged(source, subfolder=hub.get("subfolder"))
    check_weight_files(os.fspath(base), base_config, "so it cannot be compared with the old one: give 16 or 32 bits.")
    old = load_base(config, request, None)
    new = load_base_model(os.fspath(base), dtype=old.dtype, **location)
    changed = list(_changed(old, new))
    unused = _not_shared(old, config)
    shared = [name for name in changed if not name.startswith(unused)]
    settings = different_settings(new.config, config.text_config)
    if shared or settings:
        tensors = [f"{len(shared)} tensors that its multimodal view shares differ ({some(shared)})"] if shared else []
        raise ValueError(
            f"{source} does not fit {base}: {'; '.join([*tensors, *settings[:3]])}. It was trained on the old ones: "
            "train stage 2 on the new base, or keep the old one."
        )
    old_code = _code(old, str(request.base_location(config)), config.base_model_revision, access)
    new_code = _code(new, os.fspath(base), location.get("revision"), access)
    if code := sorted(name for name in {*old_code, *new_code} if old_code.get(name) != new_code.get(name)):
        raise ValueError(
            f"{source} does not fit {base}: its own code differs ({some(code)}), which the multimodal view runs too, "
            "so images may give something else. Keep the old base, or put the weights of the new one in a folder with "
            "the code of the old one."
        )
    del old
    model = GenieBlueForConditionalGeneration.from_pretrained(
        source, base_model=new, check_base=False, trust_remote_code=trust_remote_code, **hub
    )
    processor = model.processor_class.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    tokenizer = load_part("base's tokenizer", os.fspath(base), AutoTokenizer.from_pretrained, **location)
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(f"{base} has another vocabulary than {source} was trained with: keep the old base.")
    processor.tokenizer = tokenizer
    name, revision = resolve_base(new, os.fspath(base), location.get("revision"), access)
    model.config.base_model_name_or_path, model.config.base_model_revision = name, revision
    model.config.base_model_fingerprint = None  # found at the save
    model.config.text_config = copy.deepcopy(new.config.get_text_config(decoder=True))
    model.provenance.base_samples = tensor_samples(new)
    save_model(model, out, processor=processor, replace=False)
    return Stacked(out, str(name), revision, changed)


def _not_shared(base: PreTrainedModel, config: Any) -> tuple[str, ...]:
    """Beginnings of the names of tensors that only text runs."""
    path, _ = find_blocks(base)
    names = [f"{path}.{index}." for index in config.replicated_layers or ()]
    if isinstance(config, VlmGenieBlueConfig):
        names += config.own_language_tensors or ()
        count = config.vlm_config.get_text_config().vocab_size  # pyright: ignore[reportOptionalMemberAccess]
        head_rows = config.own_embedding_rows if config.own_head_rows is None else config.own_head_rows
        for module, rows in (
            (base.get_input_embeddings(), config.own_embedding_rows),
            (base.get_output_embeddings(), head_rows),
        ):
            names += [f"{name}.weight" for name, each in base.named_modules() if each is module and rows == count]
    return tuple(names)


def _changed(old: nn.Module, new: nn.Module) -> Iterator[str]:
    """Names of the tensors in which two bases differ, or that only one of them has."""
    first, second = old.state_dict(), new.state_dict()
    for name in {**first, **second}:
        one, other = first.get(name), second.get(name)
        if one is None or other is None or not torch.equal(one, other):
            yield name


def _code(model: PreTrainedModel, base: str, revision: str | None, access: Mapping[str, Any]) -> dict[str, str]:
    """sha256 by name of the code that a base runs from its repository, if it does; by name what is elsewhere.

    Of the files, not of the classes in memory: transformers may have taken those of the other base for both.
    """
    path = ModelFiles(base, revision=revision, **access).find(CONFIG_NAME) if model.is_remote_code() else None
    if path is None:
        return {}
    auto_map = read_settings(path).get("auto_map") or {}
    references = [auto_map[name] for name in ("AutoConfig", "AutoModelForCausalLM") if name in auto_map]
    own = [f"{reference.split('.')[0]}.py" for reference in references if "--" not in reference]
    files = [path.parent / name for name in with_siblings(path.parent, own)]
    elsewhere = {reference: reference for reference in references if "--" in reference}
    return elsewhere | {file.name: file_sha256(file) for file in files if file.is_file()}
