"""Arguments that transformers' own methods take: honoured, or refused by name before anything is read or written."""

import inspect

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_genieblue import IMAGE, change_adapter, row, save_tiny_pair, tiles, tiny_genieblue
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import PushToHubMixin

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.arguments_genieblue import (
    PUSH_KEYWORDS,
    REFUSED_TO_LOAD,
    REFUSED_TO_SAVE,
    SAVED_AS_EVER,
)

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
ADAPTER = "language_adapter/adapter_model.safetensors"
load = GenieBlueForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def seen(model):
    with torch.no_grad():
        return model(REQUEST, pixel_values=PIXELS).logits


def names_of(method):
    return {name for name in inspect.signature(method).parameters if name not in ("self", "kwargs", "model_args")}


# Loading

HONOURED = {
    "pretrained_model_name_or_path", "config", "cache_dir", "force_download", "local_files_only", "token", "revision",
    "use_safetensors", "weights_only", "disable_mmap",
}  # fmt: skip


def test_every_argument_of_loading_has_a_decision():
    assert not names_of(PreTrainedModel.from_pretrained) - HONOURED - REFUSED_TO_LOAD.keys()


@pytest.mark.parametrize("name", REFUSED_TO_LOAD)
def test_what_cannot_be_done_is_refused_before_loading(name, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be loaded with `{name}`: "):
        load(tmp_path / "missing", **{name: "auto"})


@pytest.mark.parametrize(
    "options",
    [{"use_safetensors": False}, {"adapter_kwargs": {"subfolder": "other"}}, {"adapter_name": "mine"}],
    ids=lambda options: next(iter(options)),
)
def test_other_files_than_its_own_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=f"`?{next(iter(options))}"):
        load(tmp_path / "missing", **options)


def test_unknown_argument_of_loading_is_named(pair):
    with pytest.raises(TypeError, match="lora_rnak"):
        load(pair, lora_rnak=8)


@pytest.mark.parametrize(
    "options", [{"low_cpu_mem_usage": True}, {"weights_only": True}, {"ignore_mismatched_sizes": False}], ids=str
)
def test_what_is_done_anyway_changes_nothing(options, pair):
    assert torch.equal(seen(load(pair, **options)), seen(load(pair)))


@pytest.mark.parametrize("kind", ["folder", "object"])
def test_a_genieblue_is_no_base(kind, pair):
    given = pair if kind == "folder" else AutoModelForCausalLM.from_pretrained(pair)
    with pytest.raises(ValueError, match="is already a GenieBlue"):
        load(pair, base_model=given)


def test_causal_lm_class_gives_texts_the_bases_logits(pair):
    model = AutoModelForCausalLM.from_pretrained(pair)
    assert type(model) is GenieBlueForConditionalGeneration
    base = AutoModelForCausalLM.from_pretrained(pair.parent / "base")
    ids = torch.arange(20, 29)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


# Saving


def test_every_argument_of_saving_has_a_decision():
    decided = {*REFUSED_TO_SAVE, *SAVED_AS_EVER, *PUSH_KEYWORDS, "save_original_format"}
    own = names_of(GenieBlueForConditionalGeneration.save_pretrained)
    assert not names_of(PreTrainedModel.save_pretrained) - own - decided
    assert not names_of(PushToHubMixin.push_to_hub) - decided


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tags": ["a"]}, ValueError),
        ({"distributed_checkpoint": True}, ValueError),
        ({"safe_serialization": False}, ValueError),
        ({"save_peft_format": False}, ValueError),
        ({"max_shard_size": "10KB"}, ValueError),
        ({"max_shrad_size": "10KB"}, TypeError),
        ({"commit_description": "without a push"}, TypeError),
        ({"use_temp_dir": True, "push_to_hub": True}, TypeError),
        ({"variant": "fp16", "push_to_hub": True}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_before_saving(options, error, tmp_path):
    with pytest.raises(error, match=next(iter(options))):
        tiny_genieblue().save_pretrained(tmp_path / "saved", **options)
    assert not any(tmp_path.iterdir())


def test_arguments_with_their_usual_values_change_nothing(tmp_path):
    model = tiny_genieblue()
    model.save_pretrained(tmp_path / "plain")
    usual = {"safe_serialization": True, "save_peft_format": True, "save_original_format": True, "token": None}
    model.save_pretrained(tmp_path / "usual", True, None, False, "50GB", **usual)
    for name in ("model.safetensors", ADAPTER):
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_only_the_main_process_writes(tmp_path):
    tiny_genieblue().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_variant_marks_all_weights_and_is_loaded_by_its_mark(tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = change_adapter(load(folder), seed=11)
    plain = {name: (folder / name).read_bytes() for name in ("model.safetensors", ADAPTER)}
    model.save_pretrained(folder, variant="fp16", dtype="float16")
    assert {name: (folder / name).read_bytes() for name in plain} == plain
    for name in plain:
        tensors = load_file(folder / name.replace(".safetensors", ".fp16.safetensors"))
        assert {value.dtype for value in tensors.values()} == {torch.float16}
    # Whole in itself, and stock PEFT still finds the other one.
    torch.testing.assert_close(seen(load(folder, variant="fp16", dtype="float32")), seen(model), atol=2e-2, rtol=2e-2)
    assert not torch.allclose(seen(load(folder, dtype="float32")), seen(model), atol=2e-2)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder / "language_adapter")


def test_variant_alone_is_a_whole_folder(tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = load(folder)
    model.save_pretrained(tmp_path / "alone", variant="mine")
    assert torch.equal(seen(load(tmp_path / "alone", variant="mine")), seen(model))
    with pytest.raises(OSError, match="model.safetensors"):
        load(tmp_path / "alone")
    with pytest.raises(OSError, match="model.other.safetensors"):
        load(tmp_path / "alone", variant="other")
