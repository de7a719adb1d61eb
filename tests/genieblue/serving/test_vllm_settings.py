"""Settings of vLLM that cannot be right for two views are refused by name. vLLM itself is not needed here."""

import json
import os
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from genieblue.serving.vllm import base, plugin

MODULE = "genieblue.serving.vllm.engine_settings"


@pytest.fixture
def hook(monkeypatch):
    """The hook, on names of vLLM that hold nothing."""
    config, models = ModuleType("vllm.config"), ModuleType("vllm.model_executor.models.config")
    config.CUDAGraphMode = SimpleNamespace(NONE="none", PIECEWISE="piecewise")
    config.ModelConfig = config.VllmConfig = models.VerifyAndUpdateConfig = object
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (config, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield import_module(MODULE).GenieBlueEngineSettings
    del sys.modules[MODULE]


def engine(**settings):
    usual = {
        "speculative_config": None,
        "lora_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "use_v2_model_runner": False,
        "load_config": SimpleNamespace(load_format="auto"),
        "compilation_config": SimpleNamespace(cudagraph_mode="full"),
    }
    return SimpleNamespace(**usual | settings)


def test_cuda_graphs_are_of_parts_of_a_pass(hook):
    settings = engine()
    hook.verify_and_update_config(settings)
    assert settings.compilation_config.cudagraph_mode == "piecewise"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"speculative_config": object()}, "Speculative decoding"),
        ({"lora_config": object()}, "vLLM's LoRA is on"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "Pipeline parallelism over 2 stages"),
        ({"use_v2_model_runner": True}, "V2 model runner"),
        ({"load_config": SimpleNamespace(load_format="dummy")}, "load_format is 'dummy'"),
    ],
)
def test_settings_of_the_engine_that_cannot_be_right_are_refused(hook, settings, reason):
    with pytest.raises(ValueError, match=reason):
        hook.verify_and_update_config(engine(**settings))


def model(**settings):
    text_config = SimpleNamespace(tie_word_embeddings=True)
    usual = {
        "model": "you/genieblue-3b",
        "tokenizer": "you/genieblue-3b",
        "revision": None,
        "tokenizer_mode": "auto",
        "enable_prompt_embeds": False,
        "quantization": None,
        "get_multimodal_config": lambda: SimpleNamespace(enable_mm_embeds=False),
        "hf_config": SimpleNamespace(text_config=text_config),
    }
    return SimpleNamespace(**usual | settings)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Variables that the hook may set are as they were afterwards."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND", "VLLM_MEDIA_CONNECTOR"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokenizer": "another/tokenizer"}, "another/tokenizer"),
        ({"tokenizer_mode": "mistral"}, "mode 'mistral'"),
        ({"enable_prompt_embeds": True}, "as embeddings"),
        ({"quantization": "fp8"}, "quantization is 'fp8'"),
    ],
)
def test_settings_of_the_model_that_cannot_be_right_are_refused(hook, settings, reason):
    with pytest.raises(ValueError, match=reason):
        hook.verify_and_update_model_config(model(**settings))


@pytest.mark.parametrize("name", ["VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND"])
def test_variables_for_another_runner_or_server_are_refused(hook, name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=name):
        hook.verify_and_update_model_config(model())


@pytest.mark.parametrize(("given", "expected"), [(None, "genieblue"), ("http", "http")])
def test_images_come_from_allowed_places_in_every_server_unless_it_is_told_otherwise(
    hook, given, expected, monkeypatch
):
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = base.ServedBase("/models/base", None, ["LlamaForCausalLM"], files, None)
    monkeypatch.setattr(base, "find_base", lambda *_: found)
    if given is not None:
        monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", given)
    settings = model()
    hook.verify_and_update_model_config(settings)
    assert os.environ["VLLM_MEDIA_CONNECTOR"] == expected
    assert settings.hf_config.base_weight_files == files and settings.hf_config.tie_word_embeddings


def test_how_a_base_is_quantized_is_told_before_vllm_looks_for_it(hook, monkeypatch):
    found = base.ServedBase(
        "/models/base", None, ["LlamaForCausalLM"], ["model.safetensors"], {"quant_method": "gptq"}
    )
    monkeypatch.setattr(base, "find_base", lambda *_: found)
    settings = model(get_model_arch_config=lambda: settings.hf_config.quantization_config)
    hook.verify_and_update_model_config(settings)
    assert settings.model_arch_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("trusted", [False, True])
def test_the_first_error_of_another_version_is_the_version(trusted, monkeypatch, tmp_path):
    vllm = ModuleType("vllm")
    vllm.__version__, vllm.ModelRegistry = "0.99.1", SimpleNamespace(register_model=lambda *_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    known = CONFIG_MAPPING._extra_content
    monkeypatch.setitem(known, "genieblue", known.get("genieblue"))  # as it was afterwards
    auto_map = {"AutoConfig": "configuration_genieblue.GenieBlueConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "genieblue", "auto_map": auto_map}))
    plugin.register()
    with pytest.raises(ImportError, match=r"made for vLLM 0.32, this is 0.99.1"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=trusted)
