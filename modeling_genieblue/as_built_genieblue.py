"""Records what a GenieBlue was built from and checks that it is unchanged: otherwise a save could not load."""

from typing import Any

import torch
from torch import nn

from .base_identity_genieblue import compare_with_samples, deciding_settings, plain_values, tensor_samples

BUILT_FROM = (
    "placement", "replicated_layers", "lora_rank", "lora_alpha", "lora_dropout", "image_token_id", "image_seq_length",
    "downsample_factor",
)  # fmt: skip


class AsBuilt:
    """The settings of a model, and some numbers of each of its base's tensors, when the base was attached."""

    def __init__(self, config: Any, base: nn.Module):
        self._settings = _settings(config)
        self._samples = tensor_samples(base)
        self._precision = _precision(base)

    def check_precision(self, base: nn.Module) -> None:
        """`ValueError` if the base was cast, and so answers otherwise; PEFT does it for training in few bits."""
        if (precision := _precision(base)) != self._precision:
            raise ValueError(
                f"The base was in {self._precision} and was cast to {precision} since, which changes its answers; "
                "`prepare_model_for_kbit_training` of PEFT does that. Load the model again with "
                f"`dtype={precision}` to have it in that, and leave out what casts it: nothing of the base trains."
            )

    def check(self, config: Any, base: nn.Module) -> None:
        """`ValueError` if a setting or the base is another one by now; of the base only values count, no precision."""
        now = _settings(config)
        names = sorted(self._settings.keys() | now.keys())
        changed = [
            f"`config.{name}` was {self._settings.get(name)!r} and is {now.get(name)!r}"
            for name in names
            if self._settings.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"The configuration is not the one that this model was built from: {'; '.join(changed[:3])}. Set it "
                "back, or make a new GenieBlue with `from_base`: its weights would not fit."
            )
        # A base that is sharded has other tensors, and one that PEFT has put layers into other names.
        values = {name: value for name, value in plain_values(base).items() if name in self._samples}
        samples = {name: self._samples[name] for name in values}
        if differences := compare_with_samples(base, samples, values):
            raise ValueError(
                f"The base is not as it was when this GenieBlue was put onto it: {'; '.join(differences[:3])}. A save "
                "would be of another base than the one that it names. Load the GenieBlue again, and give it what was "
                "trained: `load_state_dict(model.state_dict())`."
            )


def _precision(base: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in base.parameters()), None)


def _settings(config: Any) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in BUILT_FROM}
    for part in ("text_config", "vision_config"):
        described = getattr(config, part)
        of_part = {} if described is None else deciding_settings(described)
        settings |= {f"{part}.{name}": value for name, value in of_part.items()}
    return settings


__all__ = ["AsBuilt"]
