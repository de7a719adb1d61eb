"""Records what a GenieBlue was built from and checks that it is unchanged: otherwise a save could not load."""

from typing import Any

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
        # Not the modules, which take time to walk through, nor the parameters, which FSDP replaces.
        self._by_module = [module._parameters for module in base.modules() if module._parameters]
        self._precision = [parameter.dtype for parameter in self._base_parameters()]

    def _base_parameters(self) -> list[nn.Parameter]:
        return [value for parameters in self._by_module for value in parameters.values() if value is not None]

    def check_request(self, is_training: bool) -> None:
        """`ValueError` if a part of the base was cast, and so answers otherwise, or is about to be trained."""
        parameters = self._base_parameters()
        precision = [parameter.dtype for parameter in parameters]
        if precision != self._precision:
            was, now = next(both for both in zip(self._precision, precision, strict=False) if both[0] != both[1])
            raise ValueError(
                f"The base was in {was}, and at least a part of it was cast to {now} since, which changes its "
                f"answers. Load the model again with `dtype={now}` to have it in that, and leave out what casts it, "
                "such as `prepare_model_for_kbit_training` of PEFT: nothing of the base trains."
            )
        if is_training and any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                "Parameters of the base have `requires_grad`, so training would change its answers. Turn that off by "
                "`model.language_model.requires_grad_(False)`; `model.requires_grad_(True)` turns on all others."
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


def _settings(config: Any) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in BUILT_FROM}
    for part in ("text_config", "vision_config"):
        described = getattr(config, part)
        of_part = {} if described is None else deciding_settings(described)
        settings |= {f"{part}.{name}": value for name, value in of_part.items()}
    return settings
