"""Files that are missing, damaged, of another model or dangerous: named in a clear error, never run."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genieblue import IMAGE, change_adapter, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import tiny_base
from transformers import AutoModelForCausalLM

from genieblue.serving.conversation import Chat
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
ADAPTER = "language_adapter/adapter_model.safetensors"
SETTINGS_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"
)  # fmt: skip


def load(folder, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory):
    """A GenieBlue beside its base, which every test leaves as it was."""
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def edit_tensors(path, **changes):
    """Rewrites a safetensors file; a value of None removes the tensor."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("file", "keep"), [
    *(("genieblue/model.safetensors", keep) for keep in (0, 4, 200, 0.5, -1)), (f"genieblue/{ADAPTER}", 0),
    (f"genieblue/{ADAPTER}", -1), ("base/model.safetensors", 0), ("base/model.safetensors", -1),
])  # fmt: skip
def test_truncated_weights_are_named(file, keep, tmp_path):
    folder = save_tiny_pair(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(OSError, match="damaged|fetch|cut short|not a valid safetensors") as error:
        load(folder)
    assert str(tmp_path / file.split("/")[0]) in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", ADAPTER, "language_adapter", "config.json"])
def test_missing_file_is_named(file, tmp_path):
    folder = save_tiny_pair(tmp_path)
    shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    with pytest.raises(OSError, match=file.split("/")[-1].replace("language_adapter", "adapter_config")):
        load(folder)


def test_missing_fingerprint_is_named_and_can_be_done_without(tmp_path):
    folder = save_tiny_pair(tmp_path)
    (folder / "base_fingerprint.json").unlink()
    with pytest.raises(OSError, match="base_fingerprint.json"):
        load(folder)
    assert load(folder, check_base=False).language_model is not None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}'])
def test_broken_fingerprint_is_a_clear_error(content, tmp_path):
    folder = save_tiny_pair(tmp_path)
    (folder / "base_fingerprint.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="base_fingerprint.json"):
        load(folder)


@pytest.mark.parametrize("file, content", [
    *((file, content) for file in SETTINGS_FILES for content in ("[]", "")), ("config.json", "[" * 100_000),
    *((file, "{}") for file in ("config.json", "processor_config.json", "tokenizer.json")),
], ids=lambda value: value[:22])  # fmt: skip
def test_settings_that_are_something_else_are_named(file, content, saved_pair):
    intact = (saved_pair / file).read_bytes()
    (saved_pair / file).write_text(content)
    try:
        with pytest.raises(OSError, match=f"{file} (holds|has no|cannot be read).*fetch it again"):
            Chat.from_pretrained(saved_pair)
    finally:
        (saved_pair / file).write_bytes(intact)


@pytest.mark.parametrize("changes", [
    {"text_config": {"model_type": "nonsense"}}, {"text_config": 5}, {"text_config": []}, {"vision_config": "x"},
    {"vision_config": {"model_type": "siglip_vision_model", "patch_size": 0}}, {"vision_config": {"patch_size": "x"}},
    {"base_model_name_or_path": 5}, {"lora_dropout": "x"}, {"dtype": "float7"}, {"dtype": []}, {"auto_map": None},
], ids=str)  # fmt: skip
def test_settings_of_another_kind_name_config_json(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(tiny_config_text()), **changes}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")  # looked at after the settings
    for read in (load, Chat.from_pretrained):
        with pytest.raises((OSError, ValueError), match="config.json.*(has|cannot be used)"):
            read(tmp_path)


@functools.cache
def tiny_config_text() -> str:
    return tiny_genieblue().config.to_json_string()


@pytest.mark.parametrize("change", [
    {"values": "x"}, {"values": [1.0]}, {"values": ["x"] * 8}, {"positions": [0] * 7 + [10**9]}, {"shape": [None]},
    {"dtype": "float7"}, {"dtype": 5}, {"positions": None},
], ids=str)  # fmt: skip
def test_broken_sample_of_the_base_is_a_clear_error(change, saved_pair):
    path = saved_pair / "base_fingerprint.json"
    intact = path.read_text()
    samples = json.loads(intact)
    name = next(iter(samples))
    path.write_text(json.dumps(samples | {name: samples[name] | change}))
    try:
        with pytest.raises(OSError, match="base_fingerprint.json records no base"):
            load(saved_pair)
    finally:
        path.write_text(intact)


@pytest.mark.parametrize("content", ["null", "5", "[]"])
def test_broken_generation_settings_of_the_base_are_named(content, saved_pair):
    path = saved_pair.parent / "base" / "generation_config.json"
    intact = path.read_text()
    path.write_text(content)
    try:
        with pytest.raises(OSError, match="generation_config.json holds a JSON"):
            load(saved_pair)
    finally:
        path.write_text(intact)


def adapter_names(folder, part):
    return [name for name in load_file(folder / ADAPTER) if part in name]


@pytest.mark.parametrize("part", ["lora_A", "layers.3.mlp"])
def test_missing_adapter_tensor_is_refused(part, tmp_path):
    folder = save_tiny_pair(tmp_path)
    name = adapter_names(folder, part)[0]
    edit_tensors(folder / ADAPTER, **{name: None})
    with pytest.raises(ValueError, match="1 tensors are missing") as error:
        load(folder)
    assert name in str(error.value)


def test_unexpected_adapter_tensor_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    edit_tensors(folder / ADAPTER, **{"base_model.model.model.layers.3.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)})
    with pytest.raises(ValueError, match="1 tensors are not expected.*layers.3.mlp.up_proj"):
        load(folder)


def test_adapter_tensor_of_another_shape_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    name = adapter_names(folder, "lora_B")[0]
    edit_tensors(folder / ADAPTER, **{name: torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"shape \[3, 4\]"):
        load(folder)


def test_adapter_of_another_rank_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    edit_config(folder, lora_rank=8)
    with pytest.raises(ValueError, match="has r 4, config.json means 8"):
        load(folder)
    change = {"r": 8}
    path = folder / "language_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="shape"):
        load(folder)


@pytest.mark.parametrize("change, message", [
    ({"multi_modal_projector.linear_1.bias": None}, "missing.*multi_modal_projector.linear_1.bias"),
    ({"multi_modal_projector.linear_3.bias": torch.zeros(3)}, "unexpected.*linear_3"),
    ({"multi_modal_projector.linear_1.bias": torch.zeros(3)}, "linear_1.bias"),
    ({"vision_tower.post_layernorm.weight": None}, "missing.*post_layernorm"),
    ({"language_model.model.norm.weight": torch.zeros(32)}, "unexpected.*language_model.model.norm"),
])  # fmt: skip
def test_own_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    folder = save_tiny_pair(tmp_path)
    names = load_file(folder / "model.safetensors")
    change = {next((full for full in names if full.endswith(name.split(".", 1)[1])), name): tensor
              for name, tensor in change.items()}  # fmt: skip
    edit_tensors(folder / "model.safetensors", **change)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("dtype, word", [(torch.int64, "I64"), (torch.complex64, "C64")], ids=str)
def test_own_weights_that_are_no_floating_point_numbers_are_refused(dtype, word, tmp_path):
    folder = save_tiny_pair(tmp_path)
    name = "multi_modal_projector.linear_1.bias"
    edit_tensors(folder / "model.safetensors", **{name: load_file(folder / "model.safetensors")[name].to(dtype)})
    with pytest.raises(ValueError, match=f"model.safetensors.*{name} holds {word}, expected floating"):
        load(folder)


def test_adapter_config_in_the_root_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    shutil.copy(folder / "language_adapter/adapter_config.json", folder)
    with pytest.raises(ValueError, match="adapter_config.json in its root.*language_adapter"):
        load(folder)


def test_base_that_needs_remote_code_asks_for_permission(tmp_path):
    folder = save_tiny_pair(tmp_path, "bluelm")
    for kwargs in ({}, {"trust_remote_code": False}, {"base_model": tmp_path / "base"}):
        with pytest.raises((ValueError, OSError), match="trust_remote_code"):
            load(folder, **kwargs)
    model = load(folder, trust_remote_code=True)
    assert type(model.language_model).__name__ == "BlueLMForCausalLM"


def test_pickled_base_is_refused_and_never_opened(tmp_path):
    folder = save_tiny_pair(tmp_path)
    tripwire = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (open, (str(tripwire), "w"))

    (tmp_path / "base/model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(folder)
    assert not tripwire.exists()


def test_model_without_a_named_base_asks_for_one(tmp_path):
    model = tiny_genieblue()
    model.save_pretrained(tmp_path / "genieblue")
    with pytest.raises(ValueError, match="base_model="):
        load(tmp_path / "genieblue")
    loaded = load(tmp_path / "genieblue", base_model=tiny_base("llama"))
    assert torch.equal(loaded(REQUEST, pixel_values=PIXELS).logits, model(REQUEST, pixel_values=PIXELS).logits)


def test_adapter_that_is_refused_leaves_the_given_base_fit_for_use(tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = base(prompt()).logits
    edit_tensors(folder / ADAPTER, **{adapter_names(folder, "lora_A")[0]: None})
    with pytest.raises(ValueError, match="missing"):
        load(folder, base_model=base)
    assert torch.equal(base(prompt()).logits, expected)
    model = change_adapter(tiny_genieblue(base=base))
    assert len(list(adapter_parameters(model.multimodal_language_model))) == 3 * 7 * 2 + 9
