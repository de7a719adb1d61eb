"""What vLLM runs when it starts, in each of its processes: makes GenieBlue known to it, and imports little."""

from typing import Any

ARCHITECTURE = "GenieBlueForConditionalGeneration"
MODEL_TYPE = "genieblue"
TOKENIZER_MODE = "genieblue"
MEDIA_CONNECTOR = "genieblue"  # the value of VLLM_MEDIA_CONNECTOR with which images come from allowed places alone
VLLM_VERSION = "0.32"  # the plugin relies on parts of vLLM that change from one minor version to the next


def register() -> None:
    """Registers the model, its configuration, processor, chat renderer and the reader of images.

    With another version of vLLM only the model's names, under which it then says so: no other model is disturbed.
    """
    from vllm import ModelRegistry, __version__

    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    if (error := other_version(__version__)) is not None:
        _register_refusal(error)
        return
    # Ahead of `modeling_genieblue`, which then imports no model: vLLM has its own.
    import hub_cards  # noqa: F401, I001
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from genieblue.serving.vllm.engine_settings import GenieBlueEngineSettings
    from genieblue.serving.vllm.media import LimitedConnector
    from modeling_genieblue.configuration_genieblue import GenieBlueConfig
    from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor
    from modeling_genieblue.processing_genieblue import GenieBlueProcessor

    AutoConfig.register(GenieBlueConfig.model_type, GenieBlueConfig, exist_ok=True)
    AutoImageProcessor.register(GenieBlueConfig, GenieBlueImageProcessor, exist_ok=True)
    AutoProcessor.register(GenieBlueConfig, GenieBlueProcessor, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = GenieBlueEngineSettings
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(LimitedConnector)
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:
        # The base's tokenizer as it is; the mode names the renderer.
        TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__package__}.renderer", "GenieBlueRenderer")


def _register_refusal(error: ImportError) -> None:
    """Makes the configuration, which is what vLLM reads first of a model, say what is wrong."""
    from transformers import AutoConfig, PretrainedConfig

    class RefusedConfig(PretrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, *_: Any, **__: Any) -> Any:
            raise error

    AutoConfig.register(MODEL_TYPE, RefusedConfig, exist_ok=True)


def other_version(version: str) -> ImportError | None:
    """What to say of a version of vLLM that the plugin is not made for; `None` for one that it is."""
    if version.startswith(f"{VLLM_VERSION}."):
        return None
    return ImportError(
        f"GenieBlue's plugin is made for vLLM {VLLM_VERSION}, this is {version}: pip install 'genieblue[vllm]' in an "
        "environment of its own, or serve the model with `transformers serve`."
    )


def require_supported_vllm() -> None:
    """`ImportError` with another version of vLLM."""
    from vllm import __version__

    if (error := other_version(__version__)) is not None:
        raise error
