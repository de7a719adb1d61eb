"""What must not change of a GenieBlue that refuses something."""

from typing import Any

import torch
from tiny_genieblue import IMAGE, prompt, row, tiles

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
COMPILED = {"_compiled_call", "_last_compile_config"}  # what `get_compiled_call` keeps


def portrait(model: Any) -> dict[str, Any]:
    """All tensors of both views by name and object, what trains, hooks, configurations, and an answer of each view."""
    with torch.no_grad():
        answers = [model(prompt()).logits, model(REQUEST, pixel_values=PIXELS).logits]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": [(name, id(tensor), tensor.dtype, tensor.detach().numpy().tobytes()) for name, tensor in tensors],
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        "configs": [part.config.to_json_string(use_diff=False) for part in (model, model.language_model)],
        "attention": [part.config._attn_implementation for part in (model, model.language_model)],
        "attributes": [sorted(set(vars(part)) - COMPILED) for part in (model, model.language_model)],
        "answers": [answer.numpy().tobytes() for answer in answers],
    }
