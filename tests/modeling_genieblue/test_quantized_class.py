"""A quantized GenieBlue is a class of its own, which every way in finds; a 16-bit one knows nothing of it."""

import ast
import json
import os
from pathlib import Path

import pytest
from clean_process import ask, run_clean
from tiny_genieblue import save_tiny_pair
from tiny_quantized import large_pair, load, own_copy, quantized_pair
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    QuantizedGenieBlueConfig,
    QuantizedGenieBlueForConditionalGeneration,
)

CODE = Path(__file__).parents[2] / "modeling_genieblue"


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_code_of_a_16_bit_model_imports_no_quantized_file():
    for path in CODE.glob("*_genieblue.py"):
        if not path.name.startswith("quantized_"):
            imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            assert not [node.module for node in imports if "quantized" in (node.module or "")], path.name


def test_each_folder_names_its_own_class_and_holds_its_code():
    plain, quantized = large_pair(), quantized_pair() / "genieblue"
    assert "quantization" not in settings_of(plain)
    for folder, prefix, name in ((plain, "", ""), (quantized, "quantized_", "Quantized")):
        code_map = settings_of(folder)["auto_map"]
        assert code_map["AutoConfig"] == f"{prefix}configuration_genieblue.{name}GenieBlueConfig"
        assert code_map["AutoModel"] == f"{prefix}modeling_genieblue.{name}GenieBlueForConditionalGeneration"
        found = {path.name for path in folder.glob("*.py")}
        own = [path.name for path in CODE.glob("*_genieblue.py") if "vlm_" not in path.name]
        assert found == {name for name in own if prefix or "quantized" not in name}


@pytest.mark.parametrize("auto_class", [GenieBlueForConditionalGeneration, QuantizedGenieBlueForConditionalGeneration,
                                        AutoModel, AutoModelForImageTextToText])  # fmt: skip
def test_every_way_in_gives_the_quantized_class(auto_class):
    model = auto_class.from_pretrained(quantized_pair() / "genieblue")
    assert type(model) is QuantizedGenieBlueForConditionalGeneration
    assert type(model.config) is QuantizedGenieBlueConfig


def test_configurations_are_told_apart_by_their_settings():
    for config_class in (AutoConfig, GenieBlueConfig, QuantizedGenieBlueConfig):
        assert type(config_class.from_pretrained(quantized_pair() / "genieblue")) is QuantizedGenieBlueConfig
    assert type(AutoConfig.from_pretrained(large_pair())) is GenieBlueConfig


def test_a_16_bit_folder_is_not_loaded_as_a_quantized_one():
    with pytest.raises(ValueError, match="is not quantized: load it by GenieBlueForConditionalGeneration"):
        QuantizedGenieBlueForConditionalGeneration.from_pretrained(large_pair())


def test_a_folder_of_an_earlier_version_is_refused_with_the_way_to_go(tmp_path):
    folder = own_copy(quantized_pair(), tmp_path) / "genieblue"
    settings = settings_of(folder)
    settings["auto_map"] = {name: place.replace("quantized_", "").replace("Quantized", "")
                            for name, place in settings["auto_map"].items()}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="earlier version .* quantize the 16-bit GenieBlue again"):
        load(folder)


def test_a_class_that_a_user_made_from_ours_is_saved_as_ours(tmp_path):
    class Mine(GenieBlueForConditionalGeneration):
        pass

    model = Mine.from_pretrained(save_tiny_pair(tmp_path))
    assert type(model) is Mine
    model.save_pretrained(tmp_path / "saved")
    settings = settings_of(tmp_path / "saved")
    assert settings["architectures"] == ["GenieBlueForConditionalGeneration"]
    assert type(load(tmp_path / "saved")) is GenieBlueForConditionalGeneration


@pytest.mark.parametrize("order", [("plain", "quantized"), ("quantized", "plain")], ids="-".join)
def test_both_kinds_run_as_remote_code_in_one_process(order, tmp_path):
    """transformers remembers for each configuration class of remote code which model class it belongs to."""
    folders = {"plain": large_pair(), "quantized": quantized_pair() / "genieblue"}
    code = f"""
    from transformers import AutoModel
    folders = {[str(folders[name]) for name in order]!r}
    models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in folders]
    answer([[type(model).__name__, ask(model)] for model in models])
    """
    expected = [[type(model).__name__, ask(model)] for model in (load(folders[name]) for name in order)]
    assert (
        run_clean(code, tmp_path, {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "1"})
        == expected
    )
