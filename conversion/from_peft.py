"""Makes a GenieBlue of an existing PEFT adapter (LoRA, whole blocks, or both) and a SigLIP."""

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from conversion.create import create_genieblue
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
    find_blocks,
    load_adapter,
    set_parameter,
)
from modeling_genieblue.loading_genieblue import hub_commit
from modeling_genieblue.model_files_genieblue import (
    ACCESS_KEYS,
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    check_folder_or_id,
    is_path,
    read_settings,
    some,
)

logger = logging.getLogger(__name__)
# What of PEFT's LoRA has no place in a GenieBlue's adapter, and the value without effect.
NOT_CARRIED = {
    "use_dora": (False, None), "lora_bias": (False, None), "bias": ("none", None), "layer_replication": (None,),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "fan_in_fan_out": (False, None),
    # The other ways to begin also change the weights of the base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class FromPeft:
    """What was written: the folder, the copied blocks, the adapter's rank of LoRA where it names no other for a layer,
    and the relative error of the logits."""

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
    LoRA merged into the copies. LoRA of the other blocks is taken over at its ranks.

    Args:
        adapter: folder or Hub id of a stock PEFT adapter of a language model.
        vision: folder or Hub id of a SigLIP.
        base: folder or Hub id of the adapter's base, by default the one that it names, at the revision that it names;
            a path that it names is relative to its folder.
        options: as for `create_genieblue` (`max_tiles`, `chat_template`, `dtype`, `base_revision`, `token`, …).

    Raises `ValueError` or `OSError`, leaving nothing behind, for an output that exists, an adapter of another kind or
    with parts that a GenieBlue has no place for, one whose tensors are not just those that its configuration means on
    this base, and a result whose logits are not the adapter's.
    """
    hub = {name: options[name] for name in ACCESS_KEYS if options.get(name) is not None}
    folder = Path(adapter)
    check_folder_or_id(adapter, "The adapter ")
    if not folder.is_dir():
        folder = Path(snapshot_download(os.fspath(adapter), revision=adapter_revision, **hub))
    source = _PeftAdapter(folder, os.fspath(adapter), placement)
    if not base:
        base = source.base()
        if options.get("base_revision") is None and not os.path.isdir(base):
            options["base_revision"] = source.settings.get("revision")
    else:
        source.warn_of_other(os.fspath(base), options.get("base_revision"), hub)
    out = check_new_folder(output, [folder, base])
    create_genieblue(base, vision, out, placement=placement, structure=source.structure, adapt=source.fill, **options)
    return FromPeft(out, source.replicated, source.settings["r"], source.error)


class _PeftAdapter:
    """An existing adapter on its way into a GenieBlue: its settings at first, then its tree over the base's weights.

    Making one raises `ValueError` or `OSError` for what a GenieBlue cannot take over, as far as settings tell.
    """

    tree: PreTrainedModel
    replicated: list[int]
    error: float

    def __init__(self, folder: Path, name: str, placement: str):
        self.name, self.folder, self.placement = name, folder, placement
        self.weights = folder / ADAPTER_WEIGHTS_NAME
        if not (folder / ADAPTER_CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{name} has no {ADAPTER_CONFIG_NAME}: give the folder of a PEFT adapter.")
        self.settings = read_settings(folder / ADAPTER_CONFIG_NAME, ["peft_type"])
        if self.settings["peft_type"] != "LORA":
            raise ValueError(f"{name} is a PEFT adapter of type {self.settings['peft_type']}: expected LORA.")
        for setting, kinds in (("r", int), ("lora_alpha", (int, float))):
            value = self.settings.get(setting)
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise ValueError(
                    f"{setting} is {value!r} in {folder / ADAPTER_CONFIG_NAME}, expected a positive number: fetch it "
                    "again."
                )
        for setting, neutral in NOT_CARRIED.items():
            if self.settings.get(setting) not in neutral:
                raise ValueError(
                    f"{name} has {setting} {self.settings[setting]!r}, which a GenieBlue's adapter has no place for: "
                    "expected plain LoRA and whole blocks."
                )
        if not self.weights.is_file():
            raise FileNotFoundError(
                f"{name} has no {ADAPTER_WEIGHTS_NAME}: only safetensors files are read; convert it."
            )
        try:
            with safe_open(self.weights, framework="pt") as file:
                self.shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        except SafetensorError as error:
            raise OSError(f"{self.weights} cannot be read ({error}): it is damaged; fetch it again.") from error

    def base(self) -> str:
        """Hub id or absolute path of the base that it names."""
        name = self.settings.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{self.name} does not name its base: give it (--base).")
        if not is_path(name) and not (self.folder / name).is_dir():
            return name
        path = self._beside(name)
        if not os.path.isdir(path):
            raise FileNotFoundError(
                f"{self.name} names its base as {name!r}, that is {path}, and there is no such folder: give the base "
                "(--base)."
            )
        return path

    def warn_of_other(self, base: str, revision: str | None, access: Mapping[str, Any]) -> None:
        """Warns if the base that it is put on is not the one that it names, as far as names and commits tell."""
        name, recorded = self.settings.get("base_model_name_or_path"), self.settings.get("revision")
        if not name:
            return
        named, given = name, base
        if os.path.isdir(base):
            is_same = os.path.realpath(base) == os.path.realpath(self._beside(name))
        elif is_same := base == name and not os.path.isdir(self._beside(name)):
            commits = [hub_commit(base, each, newest=True, **access) or each for each in (recorded, revision)]
            is_same = recorded is None or commits[0] == commits[1]
            named, given = f"{name} at {recorded}", f"{base} at {revision or 'its newest revision'}"
        if not is_same:
            logger.warning(
                "%s names %s as its base and is put on %s: unless both have the same weights, images get other "
                "answers than it was trained for.",
                self.name, named, given,
            )  # fmt: skip

    def _beside(self, path: str) -> str:
        """A path that it names, from its folder."""
        return os.path.normpath(os.path.join(os.path.realpath(self.folder), os.path.expanduser(path)))

    def structure(self, base: PreTrainedModel) -> dict[str, Any]:
        """Loads the adapter over the base; returns what of a GenieBlue must be as in it.

        Raises `ValueError` unless every tensor has its place in the base, in its blocks, and every place its tensor.
        """
        path, blocks = find_blocks(base)
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.tree = copy.deepcopy(base, memo)  # the base stays as it is
        try:
            inject_adapter_in_model(
                PeftConfig.from_pretrained(str(self.folder)), self.tree, ADAPTER, low_cpu_mem_usage=True
            )
            whole, lora = self._parts(base, path)
            load_adapter(self.tree, self.weights, base.dtype)
        except (ValueError, TypeError) as error:  # PEFT checks few types
            remedy = self._names_of_a_vlm(base, path)
            raise ValueError(f"{self.name} does not fit its base: {error}{remedy}") from error
        if broken := [name for _, name, each in adapter_parameters(self.tree) if not each.isfinite().all()]:
            raise ValueError(
                f"{self.name} contains NaN or infinity ({some(broken)}): train it again, or fetch it again."
            )
        self.replicated = whole or select_replicated_layers(len(blocks), self.placement)
        merged = tuple(f"{path}.{index}." for index in self.replicated)
        rank = self.settings["r"]
        pattern = {name: each for name, each in lora.items() if each != rank and not name.startswith(merged)}
        # The ranks are the adapter's; alpha is of no account, since `fill` puts the adapter's scales into B.
        ranks = {"lora_rank": rank, "lora_alpha": rank, "rank_pattern": pattern or None}
        return {"replicated_layers": self.replicated, **ranks}

    def _parts(self, base: PreTrainedModel, path: str) -> tuple[list[int], dict[str, int]]:
        """Indices of the blocks that it has whole, and the rank of LoRA by layer.

        Raises `ValueError` for other modules that it has whole, and for any outside of the blocks.
        """
        modules: dict[str, Any] = dict(self.tree.named_modules())
        whole = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
        lora = {name: module.r[ADAPTER] for name, module in modules.items() if hasattr(module, "lora_A")}
        indices = {name: name.removeprefix(f"{path}.") for name in whole}
        others = {name for name, index in indices.items() if not index.isdigit()}
        known = {name for name, _ in base.named_modules()}
        in_file = {_owner(key) for key in self.shapes} & known - {""}
        others |= {name for name in (*lora, *in_file) if not name.startswith(f"{path}.")}
        if others:
            raise ValueError(
                f"it also has {some(sorted(others))}. A GenieBlue's adapter has LoRA and whole blocks alone, since "
                "embeddings, norms and head are the base's: train without them, or merge them into the base."
            )
        return sorted(int(index) for index in indices.values()), lora

    def _names_of_a_vlm(self, base: PreTrainedModel, path: str) -> str:
        """How to rename the tensors, if they are named as in a VLM with a language model like the base; else ''."""
        blocks = f".{path.rpartition('.')[2]}."
        modules, fits = dict(base.named_modules()), {}
        for key, shape in self.shapes.items():
            head, found, inner = _owner(key).partition(blocks)
            if found and ".lora_A." in key and not key.startswith(f"{PEFT_PREFIX}{path}."):
                weight = getattr(modules.get(f"{path}.{inner}"), "weight", None)
                fits[head] = fits.get(head, True) and weight is not None and weight.shape[-1] == shape[-1]
        heads = [head for head, is_fitting in fits.items() if is_fitting]
        if len(heads) != 1:
            return ""
        return (
            f" It was trained on a VLM. If the language model of that VLM has the weights of this base, then rename "
            f"{PEFT_PREFIX}{heads[0]}{blocks}… to {PEFT_PREFIX}{path}.… in {ADAPTER_WEIGHTS_NAME}, in "
            f"{ADAPTER_CONFIG_NAME} the names that have this beginning too, and leave out what it has of the vision "
            "side. Otherwise it changes weights that this base does not have."
        )

    @torch.no_grad()
    def fill(self, model: GenieBlueForConditionalGeneration) -> None:
        """Fills the adapter of `model`, of this structure, and measures `error`, the relative one of its logits.

        LoRA that the adapter lacks stays untrained. Raises `ValueError` if the error is not small.
        """
        base, view = model.language_model, model.multimodal_language_model
        modules = dict(self.tree.named_modules())
        for name, stock, _ in list(adapter_parameters(view)):
            base_name = stock.removeprefix(PEFT_PREFIX)
            if ".modules_to_save." in name:
                value = merged_tensor(base_name, base.get_parameter(base_name), modules)
                set_parameter(view, name, value.clone().to(adapter_dtype(name, base.dtype)))
            elif ".lora_A." in name:
                given: Any = modules.get(_owner(stock))
                if not hasattr(given, "lora_A"):
                    continue
                layer: Any = view.get_submodule(_owner(stock))
                scale = given.scaling[ADAPTER] / layer.scaling[ADAPTER]
                set_parameter(view, name, given.lora_A[ADAPTER].weight.float())
                set_parameter(view, name.replace(".lora_A.", ".lora_B."), given.lora_B[ADAPTER].weight.float() * scale)
        prompts = [torch.tensor([[byte % model.config.image_token_id for byte in each.encode()]]) for each in PROMPTS]
        logits = [
            torch.cat([each(input_ids=ids.to(base.device)).logits[0].float().cpu() for ids in prompts])
            for each in (self.tree.eval(), view)
        ]
        self.error, _ = logits_error(*logits)
        if not self.error <= LARGEST_ERROR.get(base.dtype, 1e-3):
            raise ValueError(
                f"The multimodal view's logits differ from the adapter's by {self.error:.2g} of their size: it has "
                "parts that a GenieBlue's adapter cannot carry."
            )


def _owner(key: str) -> str:
    """The module of the base that a tensor of an adapter belongs to."""
    name, is_lora, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_")
    return name if is_lora else name.rpartition(".")[0].removesuffix(".base_layer")
