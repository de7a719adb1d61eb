"""The stock PEFT adapter of the multimodal view: copies of the replicated blocks, LoRA on all others."""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .compat_genieblue import require_peft

require_peft()

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .model_files_genieblue import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, ADAPTER_WEIGHTS_NAME, PEFT_PREFIX, some

try:
    from peft import LoraConfig, TaskType
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import DUMMY_TARGET_MODULES
except ImportError:  # Without a try transformers would import peft before `require_peft` can check it.
    raise

ADAPTER = "default"


def find_blocks(language_model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of a decoder's blocks: the heaviest `ModuleList` as long as `config.num_hidden_layers`."""
    count = language_model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [
        (sum(parameter.numel() for parameter in module.parameters()), path, module)
        for path, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not candidates:
        raise ValueError(
            f"{type(language_model).__name__} has no list of {count} blocks: GenieBlue needs a decoder that keeps its "
            "blocks in one `nn.ModuleList`, as Llama-style models do."
        )
    _, path, blocks = max(candidates, key=lambda candidate: candidate[0])
    return path, blocks


def make_lora_config(base: PreTrainedModel, config: Any) -> LoraConfig:
    """The stock PEFT configuration of a GenieBlue adapter: copies as `modules_to_save`, LoRA on all other blocks."""
    path, blocks = find_blocks(base)
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "The base already carries a PEFT adapter: merge it (`merge_and_unload()`) or load the base without it."
        )
    replicated = set(config.replicated_layers)
    adapted = [index for index in range(len(blocks)) if index not in replicated]
    linears = {
        name.rsplit(".", 1)[-1]
        for index in adapted
        for name, module in blocks[index].named_modules()
        # A kind of linear that the base's own code defines (a router, say) may return something else.
        if isinstance(module, nn.Linear) and type(module).__module__ != type(base).__module__
    }
    if not linears and adapted:
        raise ValueError(f"The blocks of {type(base).__name__} hold no `nn.Linear` that LoRA could adapt.")
    names = {
        f"{path}.{index}.{name}" for index in adapted for name, _ in blocks[index].named_modules() if name
        if name.rsplit(".", 1)[-1] in linears
    }  # fmt: skip
    if unknown := sorted(set(config.rank_pattern or {}) - names):
        raise ValueError(f"`rank_pattern` has {some(unknown)}: none is a linear layer of a block with LoRA.")
    pattern = _unique_suffix(base, path)
    where: dict[str, Any] = {
        "target_modules": sorted(linears),
        "layers_to_transform": adapted,
        "layers_pattern": pattern,
        "rank_pattern": config.rank_pattern or {},
    }
    if not adapted:  # PEFT's name for an adapter that has whole modules alone
        where = {"target_modules": DUMMY_TARGET_MODULES}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        **where,
        modules_to_save=[f"{pattern}.{index}" for index in sorted(replicated)],
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
    )


def check_adapter_settings(lora_config: LoraConfig, saved: dict) -> None:
    """`ValueError` if the saved PEFT configuration means another adapter than config.json: PEFT would run another."""
    scaling = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    for name in (*scaling, "target_modules", "layers_to_transform", "modules_to_save"):
        here: Any = getattr(lora_config, name)
        there = saved.get(name, None if here else here)  # what the file leaves out has PEFT's default
        if isinstance(here, list | set):
            here, there = sorted(here), sorted(there) if isinstance(there, list) else there
        if here != there:
            raise ValueError(
                f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME} has {name} {there!r}, config.json means {here!r}: load the "
                "files that belong together (same repository, same revision)."
            )


def _unique_suffix(model: nn.Module, path: str) -> str:
    """Shortest tail of `path` that names no other module list (a base with a vision encoder has several `layers`)."""
    others = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name != path]
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        suffix = ".".join(parts[-length:])
        if not any(f".{other}".endswith(f".{suffix}") for other in others):
            return suffix
    return path


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of the multimodal view is the adapter's, by its name, and not the base's."""
    return any(part in name for part in (".lora_A.", ".lora_B.", ".modules_to_save."))


def adapter_parameters(view: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """`(name in the tree, name in a stock PEFT checkpoint, parameter)` of everything the adapter trains."""
    for name, parameter in view.named_parameters():
        if is_adapter_name(name):
            stock = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
            yield name, PEFT_PREFIX + stock, parameter


def adapter_dtype(name: str, base_dtype: torch.dtype) -> torch.dtype:
    """Precision in memory: a copied block has the base's, LoRA at least float32.

    Stock PEFT keeps LoRA in float32 as well. It is small, trains better so, and a CPU multiplies such small matrices
    several times as fast as in half precision.
    """
    return torch.promote_types(base_dtype, torch.float32) if ".lora_" in name else base_dtype


def initialize_adapter(view: nn.Module, base_dtype: torch.dtype) -> None:
    """Copies equal to the originals, LoRA B zero: both views agree until the first training step."""
    for name, _, parameter in list(adapter_parameters(view)):
        if ".modules_to_save." in name:
            original = view.get_parameter(name.replace(f".modules_to_save.{ADAPTER}.", ".original_module."))
            if type(original) is not nn.Parameter or not original.is_floating_point():
                raise ValueError(
                    f"{name}: the base's block is quantized, so there is nothing to train a copy from. Load the base "
                    "in 16 or 32 bits to make a new GenieBlue; an existing one loads onto a quantized base."
                )
            value = original.detach().to(adapter_dtype(name, base_dtype), copy=True)
        else:
            dtype = adapter_dtype(name, base_dtype)
            value = torch.zeros(parameter.shape, dtype=dtype, device=parameter_device(view, name))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))  # PEFT's own choice
        set_parameter(view, name, value)


def parameter_device(view: nn.Module, name: str) -> torch.device:
    """Device on which an adapter parameter must lie: that of the base's weights beside it."""
    if ".modules_to_save." in name:
        neighbour = view.get_submodule(name.split(".modules_to_save.")[0] + ".original_module")
    else:
        neighbour = view.get_submodule(name.split(".lora_")[0] + ".base_layer")
    return next(
        (parameter.device for parameter in neighbour.parameters() if parameter.device.type != "meta"),
        torch.device("cpu"),
    )


def set_parameter(view: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts `value` in the place of the parameter `name` of `view`."""
    module_path, _, leaf = name.rpartition(".")
    view.get_submodule(module_path).register_parameter(leaf, nn.Parameter(value))


def load_adapter(view: nn.Module, weights_file: str | os.PathLike, base_dtype: torch.dtype) -> None:
    """Fills the adapter of `view` from a stock PEFT file; every tensor must be expected, and none may be missing.

    Raises `OSError` for a damaged file and `ValueError` for missing, unexpected or differently shaped tensors; the
    view is left as it was then.
    """
    expected = {stock: (name, parameter) for name, stock, parameter in adapter_parameters(view)}
    try:
        with safe_open(weights_file, framework="pt") as file:
            found = set(file.keys())
            problems = _key_problems(set(expected), found)
            shapes = {stock: list(file.get_slice(stock).get_shape()) for stock in found & set(expected)}
            problems += [
                f"{stock} has shape {shape}, expected {list(expected[stock][1].shape)}"
                for stock, shape in sorted(shapes.items())
                if shape != list(expected[stock][1].shape)
            ]
            problems += tensors_of_other_kinds(file, shapes)
            if problems:
                raise ValueError(
                    f"{weights_file} does not fit this base and configuration: {'; '.join(problems)}. Load the files "
                    "that belong together (same repository, same revision)."
                )
            for stock, (name, _) in expected.items():
                dtype = adapter_dtype(name, base_dtype)
                set_parameter(view, name, file.get_tensor(stock).to(parameter_device(view, name), dtype))
    except ValueError:
        raise
    except Exception as error:  # safetensors raises its own type, which is no OSError
        raise OSError(f"{weights_file} cannot be read ({error}): it is damaged; fetch it again.") from error


def tensors_of_other_kinds(file: safe_open, names: Iterable[str]) -> list[str]:
    """One sentence for each tensor of an open safetensors file that is not floating point: a cast destroys values."""
    dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(names)}
    return [
        f"{name} holds {dtype}, expected floating-point numbers"
        for name, dtype in dtypes.items()
        if dtype not in ("F64", "F32", "F16", "BF16")
    ]


def _key_problems(expected: set[str], found: set[str]) -> list[str]:
    problems = []
    if missing := expected - found:
        problems.append(f"{len(missing)} tensors are missing ({some(sorted(missing))})")
    if extra := found - expected:
        problems.append(f"{len(extra)} tensors are not expected ({some(sorted(extra))})")
    return problems


def save_adapter(
    view: nn.Module, values: Mapping[str, torch.Tensor], folder: str | os.PathLike, dtype: torch.dtype
) -> None:
    """Writes the adapter's weights to `folder` in the layout of stock PEFT, in `dtype`; `values` by name in `view`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        stock: values[name].detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for name, stock, _ in adapter_parameters(view)
    }
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def save_adapter_config(lora_config: LoraConfig, folder: str | os.PathLike) -> None:
    """Writes PEFT's configuration of the adapter, the same bytes for the same settings."""
    saved_config = copy.deepcopy(lora_config)
    saved_config.inference_mode = True
    saved_config.save_pretrained(str(folder))
    config_file = Path(folder) / ADAPTER_CONFIG_NAME
    written = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):  # of a set: otherwise no two saves are alike
        written["target_modules"] = sorted(written["target_modules"])
    config_file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
