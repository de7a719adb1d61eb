"""Makes a GenieBlue of an existing PEFT adapter (LoRA, whole blocks, or both) and a SigLIP."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from conversion.create import create_genieblue, load_part
from conversion.language_exports import LARGEST_ERROR, check_new_folder
from conversion.merge import merged_tensor
from conversion.quantization.error import logits_error
from conversion.verification.saved_model import PROMPTS
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.configuration_genieblue import select_replicated_layers
from modeling_genieblue.language_adapter_genieblue import (
    ADAPTER,
    PEFT_PREFIX,
    adapter_dtype,
    adapter_parameters,
    set_parameter,
)
from modeling_genieblue.model_files_genieblue import (
    ACCESS_KEYS,
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    read_settings,
    some,
)

# What of PEFT's LoRA has no place in a GenieBlue's adapter, and the value without effect.
NOT_CARRIED = {
    "use_dora": (False, None), "lora_bias": (False, None), "bias": ("none", None), "layer_replication": (None,),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "fan_in_fan_out": (False, None),
    # The other ways to begin also change the weights of the base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class FromPeft:
    """What was written: the folder, the copied blocks, the rank of LoRA, and the relative error of the logits."""

    output: Path
    replicated_layers: list[int]
    lora_rank: int
    error: float


def create_from_peft(
    adapter: str | os.PathLike,
    vision: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    placement: str = "skip",
    adapter_revision: str | None = None,
    **options: Any,
) -> FromPeft:
    """Writes a GenieBlue whose multimodal view is the base with an existing PEFT adapter; its projector is untrained.

    Blocks that the adapter has whole become the replicated ones. If it has none, those of `placement` are, with its
    LoRA merged into the copies. LoRA of the other blocks is taken over.

    Args:
        adapter: folder or Hub id of a stock PEFT adapter of a language model.
        vision: folder or Hub id of a SigLIP.
        base: folder or Hub id of the adapter's base, by default the one that it names.
        options: as for `create_genieblue` (`max_tiles`, `chat_template`, `dtype`, `base_revision`, `token`, …).

    Raises `ValueError` or `OSError`, leaving nothing behind, for an output that exists, an adapter of another kind or
    with parts that a GenieBlue has no place for, and a result whose logits are not the adapter's.
    """
    hub = {name: options[name] for name in ACCESS_KEYS if options.get(name) is not None}
    folder = Path(adapter)
    if not folder.is_dir():
        folder = Path(snapshot_download(os.fspath(adapter), revision=adapter_revision, **hub))
    settings, names = _read_adapter(folder, adapter)
    base = base or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not name its base: give it (--base).")
    out = check_new_folder(output, [folder, base])
    trust = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    revision = options.get("base_revision")
    config = load_part("base", os.fspath(base), AutoConfig.from_pretrained, revision=revision, **trust, **hub)
    count = config.get_text_config(decoder=True).num_hidden_layers
    whole = _whole_blocks(names, settings, adapter)
    replicated = whole or select_replicated_layers(count, placement)
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    errors = []

    def adapt(model: GenieBlueForConditionalGeneration) -> None:
        errors.append(_take_over(model, folder))

    create_genieblue(
        base, vision, out, replicated_layers=replicated, lora_rank=rank, lora_alpha=rank, adapt=adapt, **options
    )
    return FromPeft(out, sorted(replicated), rank, errors[0])


def _read_adapter(folder: Path, name: str | os.PathLike) -> tuple[dict[str, Any], list[str]]:
    """PEFT's settings and the names of the tensors; `ValueError` for what a GenieBlue cannot take over."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{name} has no {ADAPTER_CONFIG_NAME}: give the folder of a PEFT adapter.")
    settings = read_settings(folder / ADAPTER_CONFIG_NAME, ["peft_type", "r"])
    if settings["peft_type"] != "LORA":
        raise ValueError(f"{name} is a PEFT adapter of type {settings['peft_type']}: expected LORA.")
    for setting, neutral in NOT_CARRIED.items():
        if settings.get(setting) not in neutral:
            raise ValueError(
                f"{name} has {setting} {settings[setting]!r}, which a GenieBlue's adapter has no place for: expected "
                "plain LoRA and whole blocks."
            )
    weights = folder / ADAPTER_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{name} has no {ADAPTER_WEIGHTS_NAME}: only safetensors files are read; convert it.")
    try:
        with safe_open(weights, framework="pt") as file:
            return settings, list(file.keys())
    except SafetensorError as error:
        raise OSError(f"{weights} cannot be read ({error}): it is damaged; fetch it again.") from error


def _whole_blocks(names: list[str], settings: dict[str, Any], adapter: str | os.PathLike) -> list[int]:
    """Indices of the blocks that the adapter has whole; `ValueError` for other modules that it has whole."""
    blocks, others = [], []
    for module in settings.get("modules_to_save") or []:
        index = module.rpartition(".")[2]
        (blocks if index.isdigit() else others).append(module)
    outside = [name for name in names if ".layers." not in name and ".h." not in name and ".blocks." not in name]
    if others or outside:
        raise ValueError(
            f"{adapter} also has {some(sorted(others or outside))}: a GenieBlue's adapter has LoRA and whole blocks "
            "alone, since embeddings, norms and head are the base's. Train without them, or merge them into the base."
        )
    return sorted(int(module.rpartition(".")[2]) for module in blocks)


@torch.no_grad()
def _take_over(model: GenieBlueForConditionalGeneration, folder: Path) -> float:
    """Fills the adapter of `model` from the one in `folder`; returns the relative error of its logits.

    Raises `ValueError` if that is not small.
    """
    base, view = model.language_model, model.multimodal_language_model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    peft: Any = PeftModel.from_pretrained(copy.deepcopy(base, memo), str(folder))  # the base stays as it is
    tree: Any = peft.base_model.model
    modules = dict(tree.named_modules())
    for name, stock, parameter in list(adapter_parameters(view)):
        base_name = stock.removeprefix(PEFT_PREFIX)
        if ".modules_to_save." in name:
            value = merged_tensor(base_name, base.get_parameter(base_name), modules)
            set_parameter(view, name, value.clone().to(adapter_dtype(name, base.dtype)))
        elif ".lora_A." in name:
            linear = base_name.split(".lora_A.")[0]
            a, b = _factors(modules.get(linear), parameter, view.get_submodule(name.split(".lora_A.")[0]))
            set_parameter(view, name, a)
            set_parameter(view, name.replace(".lora_A.", ".lora_B."), b)
    prompts = [torch.tensor([[byte % model.config.image_token_id for byte in each.encode()]]) for each in PROMPTS]
    logits = [
        torch.cat([each(input_ids=ids.to(base.device)).logits[0].float().cpu() for ids in prompts])
        for each in (peft.eval(), view)
    ]
    error, _ = logits_error(*logits)
    if not error <= LARGEST_ERROR.get(base.dtype, 1e-3):
        raise ValueError(
            f"The multimodal view's logits differ from the adapter's by {error:.2g} of their size: it has parts that "
            "a GenieBlue's adapter cannot carry."
        )
    return error


def _factors(given: nn.Module | None, like: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of our layer for those of an adapter's; ranks that it lacks are untrained."""
    rank, rows = layer.r[ADAPTER], layer.base_layer.weight.shape[0]
    device = layer.base_layer.weight.device
    a, b = torch.empty(rank, like.shape[1], device=device), torch.zeros(rows, rank, device=device)
    nn.init.kaiming_uniform_(a, a=5**0.5)  # with B at zero, as in a layer that training has not begun with
    if given is not None and hasattr(given, "lora_A"):
        own: Any = given
        first, second = own.lora_A[ADAPTER].weight.float(), own.lora_B[ADAPTER].weight.float()
        a[: len(first)] = first
        b[:, : len(first)] = second * (own.scaling[ADAPTER] / layer.scaling[ADAPTER])
    return a, b
