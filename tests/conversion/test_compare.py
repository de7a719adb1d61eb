"""Comparing two GenieBlues: equal ones, each way to differ, and what cannot be compared."""

import shutil
from pathlib import Path

import pytest
import torch
from command_line import error_of, run, run_json
from safetensors.torch import load_file, save_file
from tiny_genieblue import change_adapter, save_tiny_pair
from tiny_quantized import quantized_pair

from conversion.compare import compare_models
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.model_files_genieblue import read_settings, write_json


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """`base` and `genieblue`: only to be read."""
    return save_tiny_pair(tmp_path_factory.mktemp("pair")).parent


@pytest.fixture
def other(pair, tmp_path) -> Path:
    """The same GenieBlue again, beside a copy of its base."""
    shutil.copytree(pair, tmp_path / "pair")
    return tmp_path / "pair/genieblue"


def test_a_copy_is_equal(pair, other):
    found = compare_models(str(pair / "genieblue"), str(other))
    assert found.is_equal
    assert set(found.counts) == {"vision_tower", "multi_modal_projector", "replicated_blocks", "lora"}
    assert "They are equal." in run("diff", pair / "genieblue", other).stdout


def test_a_copy_with_nan_is_equal_to_itself_and_not_to_what_it_was(pair, other):
    path = other / "model.safetensors"
    tensors = load_file(path)
    tensors["multi_modal_projector.linear_1.bias"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert compare_models(str(other), str(other)).is_equal
    (found,) = compare_models(str(pair / "genieblue"), str(other)).tensors
    assert (found.name, found.how) == ("multi_modal_projector.linear_1.bias", "changed")


def test_further_training_shows_in_the_parts_that_it_changed(pair, other):
    model = GenieBlueForConditionalGeneration.from_pretrained(other)
    change_adapter(model, seed=9, scale=0.01).save_pretrained(other)
    found = compare_models(str(pair / "genieblue"), str(other))
    assert {each.part for each in found.tensors} == {"replicated_blocks", "lora"}
    assert all(each.how == "changed" and 0 < each.difference < 1 for each in found.tensors)
    assert found.settings == {}


def test_the_difference_is_relative_to_the_first(pair, other):
    path = other / "model.safetensors"
    tensors = load_file(path)
    name = "multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name] * 1.25
    save_file(tensors, path, {"format": "pt"})
    (found,) = compare_models(str(pair / "genieblue"), str(other)).tensors
    assert (found.part, found.name) == ("multi_modal_projector", name) and found.difference == pytest.approx(0.25)


def test_other_shapes_dtypes_and_names_are_told_apart(pair, other):
    path = other / "language_adapter/adapter_model.safetensors"
    tensors = load_file(path)
    first, second, third = list(tensors)[:3]
    tensors["new.lora_A.weight"] = tensors.pop(first)
    tensors[second] = tensors[second][:1].clone()
    tensors[third] = tensors[third].to(torch.float16)
    save_file(tensors, path, {"format": "pt"})
    found = {each.name: each.how for each in compare_models(str(pair / "genieblue"), str(other)).tensors}
    assert found[first] == "only in the first" and found["new.lora_A.weight"] == "only in the second"
    assert (found[second], found[third], len(found)) == ("other shape", "other dtype", 4)


@pytest.mark.parametrize(
    ("scale", "printed"), [(1.25, ": other dtype, values changed by 0.25"), (1, ": other dtype, the same values")]
)
def test_values_of_another_floating_point_dtype_are_compared(pair, other, scale, printed):
    path = other / "model.safetensors"
    tensors = load_file(path)
    name = "multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name].double() * scale
    save_file(tensors, path, {"format": "pt"})
    (found,) = compare_models(str(pair / "genieblue"), str(other)).tensors
    assert (found.name, found.how) == (name, "other dtype")
    assert found.difference == pytest.approx(scale - 1)
    assert name + printed in run("diff", pair / "genieblue", other).stdout


def test_settings_that_differ_are_told_with_both_values(pair, tmp_path):
    other = save_tiny_pair(tmp_path, lora_rank=2, replicated_layers=[0])
    found = compare_models(str(pair / "genieblue"), str(other))
    assert found.settings["lora_rank"] == (4, 2) and found.settings["replicated_layers"] == ([3], [0])
    printed = run_json("diff", pair / "genieblue", other, "--json")
    assert not printed["equal"] and printed["settings"]["lora_rank"] == [4, 2]


def test_what_makes_requests_shows_with_both_values(pair, other):
    path = other / "processor_config.json"
    settings = read_settings(path)
    images = settings["image_processor"] | {"max_tiles": 9}
    write_json(path, settings | {"image_prefix": "<tile>", "image_processor": images})
    found = compare_models(str(pair / "genieblue"), str(other))
    assert [(each.name, each.how, each.settings) for each in found.files] == [
        ("processor_config.json", "changed", {"image_prefix": ("", "<tile>"), "image_processor.max_tiles": (16, 9)})
    ]
    printed = run("diff", pair / "genieblue", other).stdout
    assert "processor_config.json, image_processor.max_tiles: 16 and 9" in printed and "equal" not in printed


def test_other_files_show_by_name(pair, other):
    (other / "chat_template.jinja").write_text("other")
    (other / "projector_genieblue.py").unlink()
    (other / "vlm").mkdir()
    (other / "vlm/preprocessor_config.json").write_text("{}")
    (other / "README.md").write_text("Of no account.")
    assert [(each.name, each.how) for each in compare_models(str(pair / "genieblue"), str(other)).files] == [
        ("chat_template.jinja", "changed"),
        ("projector_genieblue.py", "only in the first"),
        ("vlm/preprocessor_config.json", "only in the second"),
    ]


def test_files_of_one_on_the_hub_are_compared(hub, pair, other):
    (other / "chat_template.jinja").write_text("other")
    (other / "vlm").mkdir()
    (other / "vlm/chat_template.jinja").write_text("other")
    hub.commit_folder("you/reader", other)
    assert [each.name for each in compare_models(str(pair / "genieblue"), "you/reader").files] == [
        "chat_template.jinja",
        "vlm/chat_template.jinja",
    ]


def test_a_quantized_one_is_compared_by_what_is_stored():
    folder = str(quantized_pair() / "genieblue")
    assert compare_models(folder, folder).is_equal


def test_a_model_of_another_kind_and_a_damaged_file_are_named(pair, other):
    assert "expected 'genieblue'" in error_of("diff", pair / "genieblue", pair / "base")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert "model.safetensors" in error_of("diff", pair / "genieblue", other)
    path.unlink()
    assert "incomplete" in error_of("diff", pair / "genieblue", other)
