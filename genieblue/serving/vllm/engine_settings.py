"""What vLLM's settings must be for a GenieBlue, checked before any weight is loaded."""

import os

from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from genieblue.serving.vllm.plugin import MEDIA_CONNECTOR, TOKENIZER_MODE

LOAD_FORMATS = ("auto", "hf", "safetensors")  # of which vLLM loads the files that were checked, and all of them


class GenieBlueEngineSettings(VerifyAndUpdateConfig):
    """vLLM's hook for models whose settings need changes; a setting that cannot be right is a `ValueError`."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Finds and checks the base, and has vLLM ask the model for positions by request, which carry its view.

        Images come from allowed places alone, unless VLLM_MEDIA_CONNECTOR says otherwise.
        """
        from genieblue.serving.vllm.base import find_base  # imports PEFT, which other models do not need

        config = model_config.hf_config
        is_own = model_config.tokenizer == model_config.model
        if not is_own or model_config.tokenizer_mode not in ("auto", "hf", TOKENIZER_MODE):
            raise ValueError(
                f"tokenizer is {model_config.tokenizer!r} (mode {model_config.tokenizer_mode!r}): a GenieBlue is "
                "served with the tokenizer in its own folder. Leave both options out."
            )
        if model_config.enable_prompt_embeds or model_config.get_multimodal_config().enable_mm_embeds:
            raise ValueError(
                "Prompts and images as embeddings do not say which view they belong to: send tokens, texts and images."
            )
        if model_config.quantization is not None:
            raise ValueError(
                f"quantization is {model_config.quantization!r}: it would round copies and LoRA too. Leave the option "
                "out; a base that is quantized already is found by its own settings (`genieblue serve --base`)."
            )
        if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":  # which processes that vLLM starts inherit
            raise ValueError("VLLM_USE_V2_MODEL_RUNNER is set: a GenieBlue has been tried with the V1 runner alone.")
        if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
            raise ValueError("VLLM_USE_RUST_FRONTEND is set: prompts with images need vLLM's server in Python.")
        os.environ.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
        model_config.tokenizer_mode = TOKENIZER_MODE
        base = find_base(model_config.model, model_config.revision, config)
        config.base_model_name_or_path, config.base_model_revision = base.location, base.revision
        config.base_weight_files = base.weight_files
        config.text_config.architectures = base.architectures
        if base.quantization:
            config.quantization_config = base.quantization
            model_config.model_arch_config = model_config.get_model_arch_config()
        # On the outer configuration only: the base's own rotary embedding stays as it is.
        config.mrope_section = [1, 1, 1]
        # vLLM hands the outer setting, which GenieBlue leaves False, down to the language model.
        config.tie_word_embeddings = bool(getattr(config.text_config, "tie_word_embeddings", False))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Keeps CUDA graphs to the parts of a pass, so that each pass chooses its view."""
        if vllm_config.speculative_config is not None:
            raise ValueError("Speculative decoding has one view for the draft: serve a GenieBlue without it.")
        if vllm_config.lora_config is not None:
            raise ValueError(
                "vLLM's LoRA is on: it would change one of two views. Serve a GenieBlue without it, or its LoRA form "
                "(`genieblue export lora`) on the base."
            )
        if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise ValueError(
                f"Pipeline parallelism over {stages} stages: the second view is one tree of modules. Split a "
                "GenieBlue with --tensor-parallel-size."
            )
        if vllm_config.use_v2_model_runner:  # which some settings ask for, whatever the environment says
            raise ValueError(
                "These settings need vLLM's V2 model runner (watermarks do, and sparse attention): a GenieBlue has "
                "been tried with the V1 runner alone."
            )
        if (load_format := vllm_config.load_config.load_format) not in LOAD_FORMATS:
            raise ValueError(
                f"load_format is {load_format!r}, expected one of {', '.join(LOAD_FORMATS)}: other loaders do not "
                "read the base's files beside the GenieBlue's."
            )
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            # A graph of a whole pass would replay the text view whatever the requests are.
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
