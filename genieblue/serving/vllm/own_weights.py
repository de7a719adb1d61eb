"""The weight files of a GenieBlue that is to be served hold what they must. Needs no vLLM.

vLLM does not: it lets any linear go without its weights, and one that it makes of several (q, k and v) without some.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel

from modeling_genieblue.language_adapter_genieblue import PEFT_PREFIX, tensors_of_other_kinds
from modeling_genieblue.loading_genieblue import LoadRequest
from modeling_genieblue.model_files_genieblue import WEIGHTS_NAME, some
from modeling_genieblue.projector_genieblue import GenieBlueMultiModalProjector


def check_own_weights(request: LoadRequest, config: Any, base_samples: dict[str, dict]) -> None:
    """`ValueError` unless the files have just the tensors that they must, in their shapes; only headers are read.

    `base_samples` are the recorded ones. Raises `OSError` for a missing or damaged file.
    """
    _check_file(Path(request.file(WEIGHTS_NAME)), _vision_shapes(config))
    _check_file(Path(request.adapter_file()), _adapter_shapes(config, base_samples))


def _vision_shapes(config: Any) -> dict[str, list[int]]:
    """Shapes by name of the vision tower's and the projector's tensors."""
    with torch.device("meta"):
        modules = nn.ModuleDict(
            {
                "vision_tower": AutoModel.from_config(config.vision_config),
                "multi_modal_projector": GenieBlueMultiModalProjector(config),
            }
        )
    return {name: list(parameter.shape) for name, parameter in modules.named_parameters()}


def _adapter_shapes(config: Any, base_samples: dict[str, dict]) -> dict[str, list[int]]:
    """Shapes by name of the language adapter's tensors: whole replicated blocks, and LoRA on the others' matrices.

    In the bases that are served every matrix of a block is a linear layer's.
    """
    shapes = {}
    for name, sample in base_samples.items():
        block, shape = re.match(r"model\.layers\.(\d+)\.", name), sample["shape"]
        if block is None:
            continue
        if int(block[1]) in config.replicated_layers:
            shapes[PEFT_PREFIX + name] = shape
        elif len(shape) == 2:
            linear = PEFT_PREFIX + name.removesuffix(".weight")
            shapes[f"{linear}.lora_A.weight"] = [config.lora_rank, shape[1]]
            shapes[f"{linear}.lora_B.weight"] = [shape[0], config.lora_rank]
    return shapes


def _check_file(path: Path, expected: dict[str, list[int]]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            problems = tensors_of_other_kinds(file, found)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read ({error}): it is damaged; fetch it again.") from error
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit this base and configuration: {some(problems)}. Serve files that belong together "
            "(same repository, same revision)."
        )
