"""Records what a GenieBlue was built from and checks that it is unchanged: otherwise a save could not load."""

from typing import Any

from torch import nn

from .base_identity_genieblue import compare_with_samples, deciding_settings, plain_values, tensor_samples

BUILT_FROM = (
    "placement", "replicated_layers", "lora_rank", "lora_alpha", "lora_dropout", "rank_pattern", "image_token_id",
    "image_seq_length", "downsample_factor",
)  # fmt: skip
_BEFORE = (
    "Load the GenieBlue again. What changes a base comes first: quantize, resize or merge it, and then make a "
    "GenieBlue from it (`from_base`); a GenieBlue itself is quantized by `genieblue quantize`."
)


class AsBuilt:
    """A model as it was when its base was attached.

    That is its settings, the names of its own tensors, the modules of the base, and some numbers of its tensors.

    Attributes: `names`, those of `state_dict()`.
    """

    def __init__(self, model: Any):
        base = model.language_model
        self.names = set(model.state_dict())
        self._settings = _settings(model.config)
        self._samples = tensor_samples(base)
        # Not the modules, which take time to walk through, but what they hold their parts in.
        modules = list(base.named_modules())
        self._parts = [(path, each._modules, list(each._modules.values())) for path, each in modules if each._modules]
        self._by_module = [each._parameters for _, each in modules if each._parameters]
        self._known = self._parameters_now()
        self._state = _state_of(self._known)

    def _parameters_now(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter, with its name within its module."""
        return [item for held in self._by_module for item in held.items() if item[1] is not None]

    def check_request(self, base: nn.Module, is_training: bool) -> None:
        """`ValueError` if the base was changed, and so answers otherwise, or is about to be trained.

        A change of values is noticed unless it goes by way of `.data`, which leaves no trace; `check` compares values.
        """
        self._check_modules()
        parameters = self._parameters_now()
        if (state := _state_of(parameters)) != self._state:
            self._check_parameters(parameters)
            self._check_precision(parameters)
            self._check_values(base)  # equal ones were moved, or written again
            self._known, self._state = parameters, state
        if is_training and any(parameter.requires_grad for _, parameter in parameters):
            raise ValueError(
                "Parameters of the base have `requires_grad`, so training would change its answers. Turn that off by "
                "`model.language_model.requires_grad_(False)`; `model.requires_grad_(True)` turns on all others."
            )

    def check(self, config: Any, base: nn.Module) -> None:
        """`ValueError` if a setting or the base has changed; of the base only the values count, not the precision."""
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
        self._check_modules()
        self._check_parameters(self._parameters_now())
        self._check_values(base)

    def _check_modules(self) -> None:
        for path, parts, were in self._parts:
            if list(parts.values()) == were:
                continue
            changed = [(name, part) for name, part in parts.items() if part not in were] or [("", None)]
            name, part = changed[0]
            kind = type(part)
            now = "lacks a module" if part is None else f"is now a {kind.__module__}.{kind.__name__}"
            raise ValueError(
                f"{'.'.join(filter(None, (path, name))) or 'The base'} {now}: a part of the base was replaced, so "
                f"its answers would differ in both views. {_BEFORE}"
            )

    def _check_parameters(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        if [name for name, _ in parameters] != [name for name, _ in self._known]:
            raise ValueError(
                "Parameters of the base are missing, added or renamed: it was pruned or reparametrized, so its "
                f"answers would differ. {_BEFORE}"
            )
        for (name, now), (_, old) in zip(parameters, self._known, strict=True):
            # A DTensor is a shard of the same values.
            if type(old) is nn.Parameter is not type(now) and not hasattr(now, "device_mesh"):
                raise ValueError(
                    f"A {name} of the base is now a {type(now).__name__}: it was quantized, so its answers would "
                    f"differ. {_BEFORE}"
                )

    def _check_precision(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        for (_, _, dtype, *_), (_, parameter) in zip(self._state, parameters, strict=True):
            if parameter.dtype != dtype:
                raise ValueError(
                    f"The base was in {dtype}, and at least a part of it was cast to {parameter.dtype}, which changes "
                    f"its answers. Load the model again with `dtype={parameter.dtype}`, and leave out what casts it, "
                    "such as PEFT's `prepare_model_for_kbit_training`: the base is not trained."
                )

    def _check_values(self, base: nn.Module) -> None:
        # A base that is sharded has other tensors.
        values = {name: value for name, value in plain_values(base).items() if name in self._samples}
        samples = {name: self._samples[name] for name in values}
        if differences := compare_with_samples(base, samples, values):
            raise ValueError(
                f"The base is not as it was when this GenieBlue was made: {'; '.join(differences[:3])}. Its "
                f"answers are not those of the base that a save would name. {_BEFORE} Trained weights move over with "
                "`load_state_dict(model.state_dict())`."
            )


def _state_of(parameters: list[tuple[str, nn.Parameter]]) -> list[tuple]:
    """What changes in a parameter that is renamed, replaced, cast, moved, or written in place."""
    return [
        (name, id(each), each.dtype, each.data_ptr(), each.is_inference() or each._version)
        if type(each) is nn.Parameter
        else (name, id(each), each.dtype)
        for name, each in parameters
    ]


def _settings(config: Any) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in BUILT_FROM}
    for part in ("text_config", "vision_config"):
        described = getattr(config, part)
        of_part = {} if described is None else deciding_settings(described)
        settings |= {f"{part}.{name}": value for name, value in of_part.items()}
    return settings
