"""Configuration of a GenieBlue: its base, its replicated blocks, and how an image becomes tokens."""

import math
import os
from typing import Any

from .compat_genieblue import require_transformers

require_transformers()

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from .addresses_genieblue import refuse_address

VISION_TYPE = "siglip_vision_model"
PLACEMENTS = ("skip", "pre", "post")
# Settings that apply to both views; unset ones come from the base.
RUNTIME_SETTINGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
# Errors raised by code that reads a setting of the wrong type.
BROKEN_SETTING = (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)
# Types of settings in config.json, if they are not null; `auto_map` is never null.
CONFIG_KINDS = {
    "text_config": dict, "vision_config": dict, "base_model_name_or_path": str, "base_model_revision": str,
    "base_model_fingerprint": dict, "weight_fingerprint": dict, "lora_dropout": (int, float), "dtype": str,
    "rank_pattern": dict,
    "auto_map": dict,
}  # fmt: skip


def runtime_settings(config: Any) -> dict[str, Any]:
    """The arguments of a pass that a configuration sets; what it leaves at `None` is not its business."""
    asked = {name: getattr(config, name, None) for name in RUNTIME_SETTINGS}
    return {name: value for name, value in asked.items() if value is not None}


def select_replicated_layers(num_hidden_layers: int, placement: str) -> list[int]:
    """Indices of the quarter of a base's blocks that is replicated and trained.

    `skip` takes every fourth block, `(i + 1) % 4 == 0` (the OpenFlamingo rule that the paper cites), `pre` the first
    quarter, `post` the last. Raises `ValueError` for an unknown placement or fewer than four blocks.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"Unknown placement {placement!r}: choose one of {', '.join(PLACEMENTS)}.")
    if num_hidden_layers < 4:
        raise ValueError(
            f"A base with {num_hidden_layers} blocks has no quarter to replicate: use one with at least 4 blocks, or "
            "choose the blocks with `replicated_layers=[...]`."
        )
    count = num_hidden_layers // 4
    if placement == "pre":
        return list(range(count))
    if placement == "post":
        return list(range(num_hidden_layers - count, num_hidden_layers))
    return [index for index in range(num_hidden_layers) if (index + 1) % 4 == 0]


def text_config_from_dict(text_config: dict[str, Any]) -> PreTrainedConfig:
    """Config object of a base from its dictionary; for a base with remote code, a plain config with its `model_type`.

    It is only a description: the base is always loaded with its own configuration.
    """
    model_type = text_config.get("model_type", "")
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**text_config)
    # `to_dict` writes the class attribute, so a type that transformers does not know needs its own class.
    described = type("DescribedTextConfig", (PreTrainedConfig,), {"model_type": model_type})
    return described(**{key: value for key, value in text_config.items() if key != "model_type"})


def name_model_class(model_type: str, model_class: str) -> None:
    """Registers a class's name with transformers, since `transformers serve` and `Trainer` look it up by name."""
    for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")[model_type] = model_class


class GenieBlueConfig(PreTrainedConfig):
    r"""Settings of everything that a GenieBlue adds to a base LLM, and the identity of that base.

    Args:
        text_config: the base's own configuration, as a description (the base is loaded from its own repository).
        vision_config: configuration of the vision tower, a SigLIP one by default.
        base_model_name_or_path: Hub id of the base, or a path (written relative to the model's folder).
        base_model_revision: commit sha of the base on the Hub; `None` for a local base.
        base_model_fingerprint: sha256 of each weight file of the base, by name.
        weight_fingerprint: sha256 of each weight file of the GenieBlue itself, by its place in the folder, as it was
            saved. Every save records it anew.
        base_model_runs_remote_code: whether the base uses code from its own repository. That code runs only if this is
            set and the user allowed it.
        placement: `skip`, `pre` or `post`: how `replicated_layers` was chosen; `None` for a custom choice.
        replicated_layers: indices of the blocks that run as trained copies in the multimodal view.
        lora_rank, lora_alpha, lora_dropout: LoRA on the linear layers of all other blocks.
        rank_pattern: ranks of linear layers that have another one than `lora_rank`, by name in the base.
        image_token_id: id of an image token. It is the first id past the base's embedding, so no text can contain it.
        image_seq_length: tokens per image tile.
        downsample_factor: side of the square of patch tokens that become one image token.
        use_cache, output_attentions, output_hidden_states, return_dict: as usual, for both views; `None`, the
            default, means the setting of the base's configuration.

    A subclass may describe models of the same type with additional settings: see `describes`.
    """

    model_type = "genieblue"
    needs_both_kinds = True  # blocks that are copied, and others with LoRA
    # Not `sub_configs_defaults`, of which transformers before 5.20 knows nothing.
    sub_configs = {"vision_config": AutoConfig}  # pyright: ignore[reportAssignmentType]: there a property

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: dict[str, str] | None = None
    weight_fingerprint: dict[str, str] | None = None
    base_model_runs_remote_code: bool = False
    placement: str | None = "skip"
    replicated_layers: list[int] | None = None
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None
    image_token_id: int | None = None
    image_seq_length: int | None = None
    downsample_factor: int = 2
    tie_word_embeddings: bool = False
    output_hidden_states: bool | None = None
    return_dict: bool | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = text_config_from_dict(self.text_config)
        kwargs.setdefault("output_attentions", None)
        self._read_vision_side()
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            _check_count("text_config.hidden_size", getattr(self.text_config, "hidden_size", None))
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout!r}: expected a number from 0 to below 1.")
        for name in ("image_token_id", "image_seq_length"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        self._check_vision_side()
        for name in ("lora_rank", "lora_alpha"):
            _check_count(name, getattr(self, name))
        for name, rank in (self.rank_pattern or {}).items():
            _check_count(f"rank_pattern[{name}]", rank)
        num_layers = getattr(self.text_config, "num_hidden_layers", None)
        if self.replicated_layers is None and num_layers is not None and self.placement is not None:
            self.replicated_layers = select_replicated_layers(num_layers, self.placement)
        if self.replicated_layers is not None:
            self.replicated_layers = check_replicated_layers(self.replicated_layers, num_layers, self.needs_both_kinds)
        if self.image_token_id is None and self.text_config is not None:
            self.image_token_id = getattr(self.text_config, "vocab_size", None)

    def _read_vision_side(self) -> None:
        """Makes objects of the dictionaries that describe the vision side."""
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": VISION_TYPE, **(self.vision_config or {})})

    def _check_vision_side(self) -> None:
        """`ValueError` for a vision side that is none of ours, or another number of tokens than a tile gives."""
        tower: Any = self.vision_config
        if tower.model_type != VISION_TYPE:
            raise ValueError(f"The vision tower is of type {tower.model_type!r}: expected {VISION_TYPE!r}.")
        _check_count("downsample_factor", self.downsample_factor)
        if self.image_seq_length is None:
            self.image_seq_length = self.tokens_per_tile
        elif self.image_seq_length != self.tokens_per_tile:
            raise ValueError(
                f"`image_seq_length` is {self.image_seq_length!r}, but a tile of this vision tower gives "
                f"{self.tokens_per_tile} tokens."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The configuration of a folder or Hub id; for errors, see `from_dict`."""
        refuse_address(pretrained_model_name_or_path)
        kwargs.setdefault("name_or_path", os.fspath(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def describes(cls, settings: dict[str, Any]) -> bool:
        """Whether settings belong to this class rather than to its parent class."""
        return False

    @classmethod
    def kind_of(cls, settings: dict[str, Any]) -> type["GenieBlueConfig"]:
        """The class for these settings: this one, or the most special subclass that describes them."""
        return next((kind.kind_of(settings) for kind in cls.__subclasses__() if kind.describes(settings)), cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in a dictionary.

        Raises `ValueError` for another kind of model (such as a plain base) or settings out of range, and `OSError`
        for settings of the wrong type.
        """
        where = f"config.json of {kwargs['name_or_path']}" if kwargs.get("name_or_path") else "config.json"
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{where} is the configuration of a {model_type!r} model, expected {cls.model_type!r}. A "
                "GenieBlue is loaded from its own folder or repository, which names its base; `from_base` (`genieblue "
                "init`) makes one."
            )
        if (kind := cls.kind_of(config_dict)) is not cls:
            return kind.from_dict(config_dict, **kwargs)
        check_config_kinds(config_dict, where)
        try:
            return super().from_dict(config_dict, **kwargs)
        except BROKEN_SETTING as error:
            raise OSError(f"{where} cannot be used ({error}): it is damaged; fetch it again.") from error
        except ValueError as error:
            raise ValueError(f"{where} cannot be used: {error}") from error

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: the patch grid, zero-padded to a multiple of `downsample_factor`, downsampled."""
        tower: Any = self.vision_config
        side = tower.image_size // tower.patch_size
        return math.ceil(side / self.downsample_factor) ** 2


def check_config_kinds(settings: dict[str, Any], where: str | os.PathLike) -> None:
    """`OSError` naming `where` if a setting in a GenieBlue's config.json has the wrong type."""
    for name, kind in CONFIG_KINDS.items():
        value = settings.get(name)
        if not isinstance(value, kind) and (value is not None or name == "auto_map" and name in settings):
            expected = {dict: "settings by name", str: "a text"}.get(kind, "a number")
            raise OSError(f"{where} has {value!r} for {name}, expected {expected}: it is damaged; fetch it again.")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}: expected an integer of at least 1.")


def check_replicated_layers(
    replicated_layers: list[int], num_hidden_layers: int | None, needs_both_kinds: bool = True
) -> list[int]:
    """Sorted block indices; `ValueError` if one repeats or is out of range.

    With `needs_both_kinds`, also if no block is copied or none is left for LoRA.
    """
    is_list = isinstance(replicated_layers, list | tuple)
    if not is_list or not all(isinstance(index, int) and not isinstance(index, bool) for index in replicated_layers):
        raise ValueError(f"`replicated_layers` is {replicated_layers!r}: expected a list of block indices.")
    layers = sorted(replicated_layers)
    if len(set(layers)) != len(layers):
        raise ValueError(f"`replicated_layers` names a block twice: {list(replicated_layers)}.")
    if num_hidden_layers is not None:
        if layers and (layers[0] < 0 or layers[-1] >= num_hidden_layers):
            raise ValueError(
                f"`replicated_layers` is {layers}, but the base has blocks 0 to {num_hidden_layers - 1} only."
            )
        if needs_both_kinds and (not layers or len(layers) == num_hidden_layers):
            raise ValueError(
                f"`replicated_layers` names {len(layers)} of {num_hidden_layers} blocks: GenieBlue replicates some "
                "blocks (a quarter in the paper) and puts LoRA on the others, so choose at least one of each."
            )
    return layers


GenieBlueConfig.register_for_auto_class()
name_model_class(GenieBlueConfig.model_type, "GenieBlueForConditionalGeneration")
