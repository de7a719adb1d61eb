"""Quantizing that is refused, or fails on the way: said early and clearly, and nothing is lost or left behind."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from tiny_models import save_tiny_base
from tiny_quantized import answers, contents, large_pair, leftovers, load, quantize, quantized_pair, same

from conversion.quantization import bases as quantized_base_module
from conversion.quantization import quantize as quantize_module
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import CalibrationSamples, quantize_genieblue
from modeling_genieblue import saving_genieblue

W8 = {"llm": "w8a16", "rounding": "rtn"}


@pytest.fixture
def must_not_load(monkeypatch):
    """A refusal that comes after the model was loaded comes too late: that takes minutes."""
    quantized_pair()  # made while it still can be

    def refuse(*_args, **_kwargs):
        raise AssertionError("The model was loaded before the request was refused.")

    monkeypatch.setattr(quantize_module.GenieBlueForConditionalGeneration, "from_pretrained", refuse)


# Refusals, before anything is loaded


def test_existing_folders_are_refused_before_the_model_is_loaded(tmp_path, must_not_load):
    for name in ("genieblue", "base"):
        shutil.copytree(quantized_pair() / name, tmp_path / name / name)
        before = contents(tmp_path)
        with pytest.raises(OSError, match="already exists"):
            quantize(large_pair(), tmp_path / name)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_read_is_never_written_to(overwrite, tmp_path, must_not_load):
    source = shutil.copytree(large_pair().parent, tmp_path / "models") / "genieblue"
    base = source.with_name("base-llm")
    before = contents(tmp_path)
    recipe = QuantizationRecipe()
    for output, base_output in (
        (source, tmp_path / "b"), (source / "inner", tmp_path / "b"), (tmp_path / "o", base),
        (tmp_path / "o", base / "inner"), (base, tmp_path / "b"), (tmp_path / "o", source),
        (tmp_path / "models", None), (tmp_path / "o", tmp_path / "models"), (tmp_path / "o", tmp_path / "o"),
        (tmp_path / "o", tmp_path / "o/base"), (tmp_path / "o/genieblue", tmp_path / "o"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError)):
            quantize_genieblue(source, output, recipe, base_output=base_output, overwrite=overwrite)
        assert contents(tmp_path) == before
        assert leftovers(tmp_path) == ["models"]


def test_links_to_what_is_read_are_seen(tmp_path, must_not_load):
    source = shutil.copytree(large_pair().parent, tmp_path / "models") / "genieblue"
    os.symlink(tmp_path / "models", tmp_path / "link")
    with pytest.raises(ValueError, match="overlaps the input"):
        quantize_genieblue(source, tmp_path / "link/genieblue", base_output=tmp_path / "b", overwrite=True)
    with pytest.raises(ValueError, match="overlaps the input"):
        quantize_genieblue(source, tmp_path / "o", base_output=tmp_path / "link/base-llm", overwrite=True)


def test_a_quantized_base_in_the_folder_that_is_replaced_is_not_used(tmp_path, must_not_load):
    """A self-contained GenieBlue holds one."""
    shutil.copytree(quantized_pair() / "genieblue", tmp_path / "q")
    shutil.copytree(quantized_pair() / "base", tmp_path / "q/base")
    before = contents(tmp_path)
    for output in ("q", "q/base/new"):
        with pytest.raises(ValueError, match="overlaps the input .*q/base"):
            options = {"quantized_base": tmp_path / "q/base", "overwrite": True}
            quantize_genieblue(large_pair(), tmp_path / output, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["output", "base_output"])
def test_folders_of_something_else_are_not_replaced(place, tmp_path, must_not_load):
    other = save_tiny_base("llama", tmp_path / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for folder in (other, tmp_path / "file", *([tmp_path / "notes"] if place == "base_output" else [])):
        places = {"output": tmp_path / "o", "base_output": tmp_path / "b", place: folder}
        with pytest.raises((ValueError, OSError)):
            quantize_genieblue(large_pair(), overwrite=True, **places)
        assert contents(tmp_path) == before


def test_contradicting_options_are_refused(tmp_path, must_not_load):
    options = {"base_output": tmp_path / "b", "quantized_base": quantized_pair() / "base", "self_contained": True}
    for left_out in options:
        two = {name: value for name, value in options.items() if name != left_out}
        with pytest.raises(ValueError, match="give only one"):
            quantize_genieblue(large_pair(), tmp_path / "o", **two)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("recipe, message", [
    ({"llm": "w2a16"}, "llm"), ({"llm": "W4A16"}, "llm"), ({"lora": "w4a16"}, "lora"), ({"llm": "int8"}, "llm"),
    ({"lm_head": "w4a16"}, "lm_head"), ({"embeddings": "w4a16"}, "embeddings"), ({"rounding": "awq"}, "rounding"),
    ({"activations": "float8"}, "activations"), ({"activations": "float64"}, "activations"),
    ({"vision_tower": None}, "vision_tower"), ({"group_size": 96}, "group_size"), ({"group_size": "64"}, "group_size"),
    (dict.fromkeys(("llm", "lora", "vision_tower", "multi_modal_projector"), "w16a16"), "nothing to quantize"),
], ids=str)  # fmt: skip
def test_recipes_that_cannot_be_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        QuantizationRecipe(**recipe)


def test_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationRecipe().llm = "w8a16"


def test_source_that_is_no_genieblue_is_refused(tmp_path):
    for source in (large_pair().parent / "base-llm", tmp_path / "missing", quantized_pair() / "base"):
        with pytest.raises((ValueError, OSError)):
            quantize(source, tmp_path / "out")
        assert not (tmp_path / "out").exists() or leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("mix", "options"),
    [({}, {}), ({}, {"quantized_base": "base"}), ({}, {"self_contained": True}), ({"llm": "w16a16"}, {})],
    ids=str,
)
def test_gptq_without_samples_is_refused(mix, options, tmp_path, must_not_load):
    if "quantized_base" in options:
        options = {"quantized_base": quantized_pair() / "base"}
    for samples in (None, CalibrationSamples(), CalibrationSamples(text=[])):
        with pytest.raises(ValueError, match="gptq needs calibration samples"):
            quantize(large_pair(), tmp_path, {"samples": samples, **options}, rounding="gptq", **mix)
    assert leftovers(tmp_path) == []


# Failures on the way


def failing(function, at_call):
    """`function`, which runs out of disk at its call number `at_call`, in the middle of a file."""
    calls = []

    def fail(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == at_call:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        return function(tensors, path, *args, **kwargs)

    return fail


@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_full_disk_leaves_nothing(at_call, tmp_path, monkeypatch):
    function = quantized_base_module.save_file
    with monkeypatch.context() as patch:
        patch.setattr(quantized_base_module, "save_file", failing(function, at_call))
        with pytest.raises(OSError, match="No space left"):
            quantize(large_pair(), tmp_path)
        with pytest.raises(OSError, match="No space left"):
            patch.setattr(quantized_base_module, "save_file", failing(function, at_call))
            quantize(large_pair(), tmp_path, {"self_contained": True})
    assert leftovers(tmp_path) == []
    quantize(large_pair(), tmp_path)
    assert leftovers(tmp_path) == ["base", "genieblue"]


@pytest.mark.parametrize("at_call", [1, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_failure_while_the_folder_is_put_together_leaves_nothing(error, at_call, tmp_path, monkeypatch):
    """The first save is the one that is measured, the second the one that stays."""
    function, calls = saving_genieblue.save_adapter_config, []

    def fail(*args):
        calls.append(args)
        if len(calls) == at_call:
            raise error
        return function(*args)

    monkeypatch.setattr(saving_genieblue, "save_adapter_config", fail)
    with pytest.raises(type(error)):
        quantize(large_pair(), tmp_path)
    assert len(calls) == at_call
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_failure_leaves_the_folders_that_were_there(at_call, tmp_path, monkeypatch):
    shutil.copytree(quantized_pair(), tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(quantized_base_module, "save_file", failing(quantized_base_module.save_file, at_call))
        with pytest.raises(OSError, match="No space left"):
            quantize(large_pair(), tmp_path, {"overwrite": True}, **W8)
    assert contents(tmp_path) == before and leftovers(tmp_path) == ["base", "genieblue"]
    quantize(large_pair(), tmp_path, {"overwrite": True}, **W8)
    assert leftovers(tmp_path) == ["base", "genieblue"]
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair(**W8) / "genieblue")))


def failing_renames(folder, at_calls):
    """`os.rename` that fails at these calls, counted from 1, of those that move something in `folder` itself."""
    calls, rename = [], os.rename

    def fail(source, target):
        if folder in (Path(source).parent, Path(target).parent):
            calls.append(target)
            if len(calls) in at_calls:
                raise OSError(16, "Device or resource busy")
        rename(source, target)

    return fail


@pytest.mark.parametrize("at_call", [1, 2])
def test_failing_rename_leaves_nothing(at_call, tmp_path, monkeypatch):
    """The base, then the GenieBlue: none may be there without the other."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing_renames(tmp_path, {at_call}))
        with pytest.raises(OSError, match="busy"):
            quantize(large_pair(), tmp_path, **W8)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("at_call", [1, 2, 3, 4, "notes"])
def test_failing_rename_leaves_the_folders_that_were_there(at_call, tmp_path, monkeypatch):
    """The old base goes and the new one comes, then the GenieBlues, then a file of the user's moves over."""
    shutil.copytree(quantized_pair(), tmp_path, dirs_exist_ok=True)
    notes = tmp_path / "genieblue/notes.txt"
    notes.write_text("mine")
    before, rename = contents(tmp_path), failing_renames(tmp_path, {at_call})

    def fail(source, target):
        if at_call == "notes" and target == notes:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="busy"):
            quantize(large_pair(), tmp_path, {"overwrite": True}, **W8)
    assert contents(tmp_path) == before and leftovers(tmp_path) == ["base", "genieblue"]
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair() / "genieblue")))


def test_old_base_that_cannot_be_moved_back_is_kept(tmp_path, monkeypatch):
    shutil.copytree(quantized_pair(), tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing_renames(tmp_path, {2, 3}))
        with pytest.raises(OSError, match="by hand"):
            quantize(large_pair(), tmp_path, {"overwrite": True}, **W8)
    kept = next(tmp_path.glob(".base.writing-*/base.old"))
    assert contents(kept) == before and (tmp_path / "genieblue/config.json").is_file()
