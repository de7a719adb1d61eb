"""Configuration of a GenieBlue whose multimodal side is a whole VLM of transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_genieblue import GenieBlueConfig, name_model_class

# Model types of VLMs whose language model has the names and shapes of a base's, and whose inputs are known.
FAMILIES = (
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "smolvlm",
)  # fmt: skip
WHAT_A_FAMILY_NEEDS = (
    "another one needs a class of `AutoModelForImageTextToText` whose `get_decoder()` has the parameter names of the "
    "base, and a place in `vlm_configuration_genieblue.FAMILIES` with a test"
)


class VlmGenieBlueConfig(GenieBlueConfig):
    r"""A `GenieBlueConfig` with a VLM in the place of vision tower and projector.

    Args:
        vlm_config: the VLM's own configuration.
        vlm_revision: the commit of a VLM from the Hub.
        image_token_id: the VLM's own; the base may have it as a token too, so that only a request with pixels has
            images.
        own_language_tensors: names in the base of what lies outside the copied blocks and the reach of LoRA (norms,
            biases) and differs from the base: the VLM's own is stored.
        own_embedding_rows, own_head_rows: numbers of rows that the VLM's embedding and head have beyond the base's, or
            that differ. `None` for the head: it is tied to the embedding, as in the base.
    """

    sub_configs = {"vlm_config": AutoConfig}  # pyright: ignore[reportAssignmentType]: there a property
    needs_both_kinds = False  # with all blocks copied it is the VLM itself

    vlm_config: dict | PreTrainedConfig | None = None
    vlm_revision: str | None = None
    own_language_tensors: list[str] | None = None
    own_embedding_rows: int = 0
    own_head_rows: int | None = None

    def _read_vision_side(self) -> None:
        self.vision_config = None
        if isinstance(self.vlm_config, dict):
            self.vlm_config = AutoConfig.for_model(**self.vlm_config)

    def _check_vision_side(self) -> None:
        of_vlm: Any = self.vlm_config
        if of_vlm is not None:
            check_family(of_vlm.model_type)

    @classmethod
    def describes(cls, settings: dict[str, Any]) -> bool:
        """Whether settings are those of a GenieBlue with a VLM."""
        return settings.get("vlm_config") is not None


def check_family(model_type: str | None, where: str = "The VLM") -> None:
    """`ValueError` for a VLM of a family that is not known to work, with what it would need."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"{where} is of type {model_type!r}: expected one of {', '.join(FAMILIES)}. Take the repository that "
            f"transformers itself loads (often named -hf); {WHAT_A_FAMILY_NEEDS}."
        )


VlmGenieBlueConfig.register_for_auto_class()
# The model type is the same, and the table has one class for each: the class's name is what matters.
name_model_class(f"vlm_{VlmGenieBlueConfig.model_type}", "VlmGenieBlueForConditionalGeneration")
