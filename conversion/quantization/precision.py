"""The precision of each part of a quantized GenieBlue, and which layers stay at 16 bits and why."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from conversion.quantization.rounding import ROUNDING_METHODS
from modeling_genieblue import GenieBlueConfig, VlmGenieBlueConfig
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, find_blocks
from modeling_genieblue.quantized_linears_genieblue import group_size_of, reason_against
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries
from modeling_genieblue.quantized_precision_guard_genieblue import is_frozen
from modeling_genieblue.quantized_settings_genieblue import ACTIVATIONS, PRECISIONS

RECIPE_GROUP_SIZES = (32, 64, 128)
VISION_PARTS = ("vision_tower", "multi_modal_projector")
KINDS = {"w4a16": "qint4", "w8a16": "qint8"}
# Of a linear in mixed precision: the largest groups of codes that share a scale at 4 bits; none at 8.
FORMATS = {"w4g128": 128, "w4g64": 64, "w4g32": 32, "w8": None}


@dataclass(frozen=True)
class QuantizationRecipe:
    """Precision of each part; the default is the paper's deployment recipe.

    `w4a16` means 4-bit weights, `w8a16` 8-bit, `w16a16` unquantized; activations always have 16 bits. Raises
    `ValueError` for a precision that a part does not support.

    Attributes:
        llm: linears of the base's blocks.
        replicated_blocks: linears of the trained copies; by default as `llm`.
        lora, vision_tower, multi_modal_projector: at 8 or 16 bits, the projector and the tower at 4 as well. Those of
            a VLM stay at 16: see `for_config`.
        lm_head, embeddings: of the base; if they share one weight, they are quantized together or not at all.
        rounding: `rtn` (nearest), `mse` (searches scales for the weights, needs no data) or `gptq` (needs samples).
        group_size: 4-bit codes with one scale, 32, 64 or 128; less where the width of a layer is no multiple of it.
        activations: number format of scales, of what is not quantized, and of the activations.
    """

    llm: str = "w4a16"
    replicated_blocks: str | None = None
    lora: str = "w8a16"
    vision_tower: str = "w8a16"
    multi_modal_projector: str = "w8a16"
    lm_head: str = "w16a16"
    embeddings: str = "w16a16"
    rounding: str = "mse"
    group_size: int = 64
    activations: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.replicated_blocks is None:
            object.__setattr__(self, "replicated_blocks", self.llm)
        for name, precision in self.parts().items():
            allowed = PRECISIONS[1:] if name in ("lora", "lm_head", "embeddings") else PRECISIONS
            if precision not in allowed:
                raise ValueError(f"`{name}` is {precision!r}: choose one of {', '.join(allowed)}.")
        if self.rounding not in ROUNDING_METHODS:
            raise ValueError(f"`rounding` is {self.rounding!r}: choose one of {', '.join(ROUNDING_METHODS)}.")
        if self.group_size not in RECIPE_GROUP_SIZES:
            choices = ", ".join(map(str, RECIPE_GROUP_SIZES))
            raise ValueError(f"`group_size` is {self.group_size!r}: choose one of {choices}.")
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"`activations` is {self.activations!r}: choose one of {', '.join(ACTIVATIONS)}.")
        if set(self.parts().values()) == {"w16a16"}:
            raise ValueError(
                "All parts are at 16 bits, so there is nothing to quantize: choose a lower precision for one."
            )

    @classmethod
    def for_config(cls, config: GenieBlueConfig, **settings: Any) -> "QuantizationRecipe":
        """The recipe for a GenieBlue with this configuration; settings that are missing or `None` have its defaults.

        Those are the defaults of this class, but for the vision side of a VLM, which stays at 16 bits.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        defaults = dict.fromkeys(VISION_PARTS, "w16a16") if isinstance(config, VlmGenieBlueConfig) else {}
        recipe = cls(**defaults | given)
        recipe.check(config)
        return recipe

    def check(self, config: GenieBlueConfig) -> None:
        """`ValueError` for a vision side of a VLM that is to be quantized."""
        asked = [f"{part} {precision}" for part in VISION_PARTS if (precision := getattr(self, part)) != "w16a16"]
        if asked and isinstance(config, VlmGenieBlueConfig):
            raise ValueError(
                f"This GenieBlue sees with a VLM of type {config.vlm_config.model_type!r}, whose vision side and "
                f"connector stay at 16 bits, and {', '.join(asked)} was requested: leave out --vision and --projector "
                "(in Python, take `QuantizationRecipe.for_config`), which quantizes its language model alone."
            )

    def parts(self) -> dict[str, str]:
        """Precision by part."""
        other = ("rounding", "group_size", "activations")
        return {name: value for name, value in asdict(self).items() if name not in other}

    @property
    def dtype(self) -> torch.dtype:
        """`activations` as a torch dtype."""
        return getattr(torch, self.activations)

    @property
    def changes_base(self) -> bool:
        """Whether the base is quantized."""
        return any(part != "w16a16" for part in (self.llm, self.lm_head, self.embeddings))


@dataclass
class LayerPlan:
    """The plan for one module tree.

    `kinds` as in a quantization map, `kept` layers with the reason, and the `formats` of those in mixed precision.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, int], precision: str) -> None:
        """Plans a linear: at most `precision`, in 8 bits where 4 do not fit its shape, else left at 16 bits."""
        if precision == "w16a16":
            return
        reasons = []
        for bits in (4, 8) if precision == "w4a16" else (8,):
            reason = reason_against(*shape, bits)
            if reason is None:
                self.kinds[name] = f"qint{bits}"
                if reasons:
                    self.kept[name] = f"8 bits instead of 4: {reasons[0]}"
                return
            reasons.append(reason)
        self.kept[name] = f"16 bits: {reasons[-1]}"

    def mix(self, formats: Mapping[str, str]) -> None:
        """Gives linears that were planned at 4 bits a format of their own, one of `FORMATS`; ignores other names."""
        for name, kind in self.kinds.items():
            if kind == "qint4" and name in formats:
                self.formats[name] = formats[name]
                self.kinds[name] = "qint8" if formats[name] == "w8" else "qint4"

    def group_size(self, name: str, weight: torch.Tensor, recipe: QuantizationRecipe) -> int | None:
        """Codes that share a scale in a row of a planned linear's weight; `None` at 8 bits, where a row has one."""
        if self.kinds[name] == "qint8":
            return None
        return group_size_of(
            weight.shape[1], FORMATS[self.formats[name]] if name in self.formats else recipe.group_size
        )

    def keep_the_rest(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Lists matrices and stacks of matrices that do not belong to a linear layer, such as experts of a mixture."""
        for name, parameter in parameters:
            if parameter.ndim >= 2 and parameter.is_floating_point():
                shape = " x ".join(map(str, parameter.shape))
                self.kept[name] = f"16 bits: a parameter of {shape}, not in a plain linear layer"


def plain_linears(tree: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linears of `tree`; a subclass (such as a router) may be used in other ways.

    Quantized ones count too, so that the plan of a quantized model can be reproduced.
    """
    return ((name, module) for name, module in tree.named_modules() if type(module) is nn.Linear or is_frozen(module))


def plan_base(base: nn.Module, recipe: QuantizationRecipe) -> LayerPlan:
    """Layers of the base by their names in its own tree.

    Raises `ValueError` for an LM head and an embedding that share their weight but not their precision.
    """
    plan = LayerPlan()
    path, blocks = find_blocks(base)
    for name, linear in plain_linears(blocks):
        plan.add(f"{path}.{name}", tuple(linear.weight.shape), recipe.llm)
    if recipe.llm != "w16a16":
        known = {f"{name}.weight" for name in (*plan.kinds, *plan.kept)}
        plan.keep_the_rest((f"{path}.{name}", parameter) for name, parameter in blocks.named_parameters()
                           if f"{path}.{name}" not in known)  # fmt: skip
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    if head is not None and head.weight is embedding.weight and recipe.lm_head != recipe.embeddings:
        raise ValueError(
            "The LM head and the embedding of this base share one weight: choose w8a16 for both or for neither (got "
            f"lm_head {recipe.lm_head}, embeddings {recipe.embeddings})."
        )
    for module, precision in ((embedding, recipe.embeddings), (head, recipe.lm_head)):
        if module is not None:
            plan.add(names[id(module)], tuple(module.weight.shape), precision)
    return plan


def plan_own_parts(model: nn.Module, recipe: QuantizationRecipe) -> LayerPlan:
    """Layers of the vision tower and the projector, by their names in the model."""
    plan = LayerPlan()
    for part in VISION_PARTS:
        precision = getattr(recipe, part)
        if precision == "w16a16":  # as always if it is a VLM's
            continue
        tree = getattr(model, part)
        for name, linear in plain_linears(tree):
            plan.add(f"{part}.{name}", tuple(linear.weight.shape), precision)
        convolutions = [name for name, module in tree.named_modules() if isinstance(module, nn.Conv2d)]
        plan.kept |= {f"{part}.{name}": "16 bits: a convolution" for name in convolutions}
    return plan


def plan_adapter(view: nn.Module, recipe: QuantizationRecipe) -> LayerPlan:
    """LoRA and the replicated blocks of a multimodal view, by their names in the adapter's file."""
    plan = LayerPlan()
    for name, stock, weight in quantized_adapter_entries(view):
        if ".lora_" not in name:
            plan.add(stock, tuple(weight.shape), recipe.replicated_blocks)
        elif recipe.lora != "w16a16":
            plan.kinds[stock] = KINDS[recipe.lora]  # expanded in memory, so that no kernel limits its shape
    if recipe.replicated_blocks != "w16a16":
        known = {f"{stock}.weight" for _, stock, _ in quantized_adapter_entries(view)}
        plan.keep_the_rest((stock, parameter) for _, stock, parameter in adapter_parameters(view)
                           if stock not in known and ".lora_" not in stock)  # fmt: skip
    return plan


def describe(recipe: QuantizationRecipe, plans: list[LayerPlan]) -> dict[str, Any]:
    """A summary for config.json."""
    kept: dict[str, str] = {}
    formats: dict[str, str] = {}
    for plan in plans:
        kept |= plan.kept
        formats |= plan.formats
    return {
        "format": "optimum-quanto", **recipe.parts(), "rounding": recipe.rounding, "group_size": recipe.group_size,
        "activations": recipe.activations, "other_precision": kept, **({"formats": formats} if formats else {}),
    }  # fmt: skip
