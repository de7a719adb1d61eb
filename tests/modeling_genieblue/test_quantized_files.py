"""Damaged files of quantized models: each is refused by name, and never read as something else."""

import json

import pytest
import torch
from tiny_quantized import (
    ADAPTER,
    ADAPTER_QMAP,
    BASE_QMAP,
    BASE_WEIGHTS,
    OWN_QMAP,
    OWN_WEIGHTS,
    answers,
    changed_tensors,
    contents,
    load,
    load_base,
    own_copy,
    quantized_pair,
    same,
)

FILES = {"own": (OWN_WEIGHTS, OWN_QMAP), "adapter": (ADAPTER, ADAPTER_QMAP), "base": (BASE_WEIGHTS, BASE_QMAP)}
MIXES = {"w4": {"lm_head": "w8a16", "embeddings": "w8a16", "vision_tower": "w4a16"},
         "w8": {"llm": "w8a16", "rounding": "rtn"}}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return own_copy(quantized_pair(**MIXES["w4"]), tmp_path)


@pytest.fixture(params=MIXES)
def either(request, tmp_path):
    """One with 4 bits and one without."""
    return own_copy(quantized_pair(**MIXES[request.param]), tmp_path)


def assert_refused(folder, part, error, *words):
    """In the GenieBlue with and without the check of the base, and in the base alone."""
    for check in (True, False):
        with pytest.raises(error) as caught:
            load(folder / "genieblue", check_base=check)
        for word in words:
            assert word in str(caught.value), str(caught.value)
    if part == "base":
        with pytest.raises(error) as caught:
            load_base(folder / "base")
        for word in words:
            assert word in str(caught.value), str(caught.value)


def quantized_names(tensors, ending):
    """Stored parts of quantized weights (not of LoRA, whose form is another), in their order."""
    return sorted(name for name in tensors if name.endswith(ending) and "lora" not in name)


# Tensors


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("ending", ["._data", "._scale", ".input_scale", ".output_scale", "norm.weight|norm2.weight"])
def test_missing_tensor_is_named(ending, part, either):
    with changed_tensors(either / FILES[part][0]) as tensors:
        names = [name for name in sorted(tensors) if any(map(name.endswith, ending.split("|")))]
        for name in names[:2]:
            del tensors[name]
    assert_refused(either, part, ValueError, names[0], "missing")


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("extra", ["nothing.weight", "weight", "of-a-quantized-layer"])
def test_unexpected_tensor_is_named(extra, part, either):
    with changed_tensors(either / FILES[part][0]) as tensors:
        if extra == "of-a-quantized-layer":  # the weight itself, beside its codes
            extra = quantized_names(tensors, ".input_scale")[0].replace("input_scale", "weight")
        tensors[extra] = torch.ones(4, 4)
    assert_refused(either, part, ValueError, extra, "not expected")


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", ["row-less", "transposed", "column-less", "scalar"])
@pytest.mark.parametrize("ending", ["._data", "._scale"])
def test_tensor_of_another_shape_is_named(ending, damage, part, either):
    changes = {
        "row-less": lambda value: value[:-1], "transposed": lambda value: value.t(),
        "column-less": lambda value: value[:, :-1], "scalar": lambda value: value.flatten()[0],
    }  # fmt: skip
    with changed_tensors(either / FILES[part][0]) as tensors:
        name = next(name for name in quantized_names(tensors, ending) if len(set(tensors[name].shape)) == 2)
        tensors[name] = changes[damage](tensors[name]).clone(memory_format=torch.contiguous_format)
    assert_refused(either, part, ValueError, name, "expected")


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("dtype", ["the other", torch.int32, torch.bfloat16, torch.bool], ids=str)
def test_codes_of_another_kind_are_named(dtype, part, either):
    with changed_tensors(either / FILES[part][0]) as tensors:
        name = quantized_names(tensors, "._data")[0]
        other = {torch.int8: torch.uint8, torch.uint8: torch.int8}[tensors[name].dtype]
        tensors[name] = tensors[name].to(other if dtype == "the other" else dtype)
    assert_refused(either, part, ValueError, name, "expected")


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("ending", ["._scale", ".input_scale", ".bias|norm.weight|layernorm.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_numbers_of_another_kind_are_named(dtype, ending, part, either):
    with changed_tensors(either / FILES[part][0]) as tensors:
        name = next(name for name in sorted(tensors) if any(map(name.endswith, ending.split("|"))))
        tensors[name] = tensors[name].to(dtype)
    assert_refused(either, part, ValueError, name)


def test_lora_of_another_shape_or_kind_is_named(either):
    with changed_tensors(either / ADAPTER) as tensors:
        first, second = sorted(name for name in tensors if "lora_A" in name and name.endswith("._data"))[:2]
        tensors[first] = tensors[first][:-1].clone()
        tensors[second] = tensors[second].to(torch.float32)
    assert_refused(either, "adapter", ValueError, first, second)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", ["half", "header", "empty", "zeros", "text", "huge-header", "missing"])
def test_damaged_file_is_named(damage, part, folder):
    path = folder / FILES[part][0]
    content = path.read_bytes()
    damaged = {
        "half": content[: len(content) // 2], "header": content[:100], "empty": b"", "zeros": bytes(len(content)),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "huge-header": b"\xff" * 8 + content[8:],
    }  # fmt: skip
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    assert_refused(folder, part, OSError, path.name)


@pytest.mark.parametrize("part", FILES)
def test_file_of_another_precision_is_refused(part, tmp_path):
    """Each alone is in order: they do not belong together."""
    folder = own_copy(quantized_pair(**MIXES["w4"]), tmp_path)
    other = quantized_pair(**MIXES["w8"])
    (folder / FILES[part][0]).write_bytes((other / FILES[part][0]).read_bytes())
    assert_refused(folder, part, ValueError, FILES[part][0].rsplit("/", 1)[-1])


@pytest.mark.parametrize("part", ["own", "adapter"])
def test_files_of_an_unquantized_model_are_refused(part, folder):
    with changed_tensors(folder / FILES[part][0]) as tensors:
        for name in quantized_names(tensors, ".input_scale"):
            tensors[name.replace("input_scale", "weight")] = torch.zeros(4, 4)
        for name in [name for name in tensors if name.endswith(("_scale", "_data", "_shift"))]:
            del tensors[name]
    assert_refused(folder, part, ValueError, "missing")


# Quantization maps


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"x": 1}', b'{"x": []}',
    b'{"x": {}}', b'{"x": {"weights": null}}', b'{"x": {"weights": []}}', b'{"x": {"weights": {}}}',
    b'{"x": {"weights": 4}}', b'{"x": {"weights": "qint2"}}', b'{"x": {"weights": "qfloat8"}}',
    b"[" * 100_000], ids=lambda content: content[:30].decode("latin-1"))  # fmt: skip
def test_damaged_map_is_named(content, part, folder):
    (folder / FILES[part][1]).write_bytes(content)
    assert_refused(folder, part, (ValueError, OSError), "quanto_qmap.json")


@pytest.mark.parametrize("part", FILES)
def test_missing_map_is_named(part, folder):
    (folder / FILES[part][1]).unlink()
    assert_refused(folder, part, OSError, "quanto_qmap.json")


def change_map(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("name", ["no.such.layer", "", ".", "model", "vision_tower", "model.norm", "model.layers.99.x",
    "vision_tower.embeddings.patch_embedding", "vision_tower.head.attention", "model.layers.0.self_attn.q_proj.weight",
    "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.3.input_layernorm",
    "model.layers.0..self_attn", "__class__"])  # fmt: skip
def test_map_that_names_what_is_no_linear_is_refused(name, part, folder):
    change_map(folder / FILES[part][1], lambda content: content.update({name: {"weights": "qint8"}}))
    assert_refused(folder, part, ValueError, name)


@pytest.mark.parametrize("part", FILES)
def test_map_without_a_layer_is_refused(part, folder):
    removed = []
    change_map(folder / FILES[part][1], lambda content: removed.append(content.popitem()[0]))
    assert_refused(folder, part, ValueError, removed[0].rsplit(".", 1)[-1])


@pytest.mark.parametrize("part", FILES)
def test_empty_map_is_refused(part, folder):
    (folder / FILES[part][1]).write_text("{}")
    assert_refused(folder, part, ValueError, "missing")


@pytest.mark.parametrize("part", FILES)
def test_map_with_other_precisions_is_refused(part, folder):
    other = {"qint4": "qint8", "qint8": "qint4"}

    def swap(content):
        for entry in content.values():
            entry["weights"] = other[entry["weights"]]

    change_map(folder / FILES[part][1], swap)
    assert_refused(folder, part, ValueError)


def test_lora_in_4_bits_is_refused(folder):
    """There is no such form of it; a map that says so is another model's."""

    def change(content):
        next(entry for name, entry in content.items() if "lora_A" in name)["weights"] = "qint4"

    change_map(folder / ADAPTER_QMAP, change)
    assert_refused(folder, "adapter", ValueError, "lora_A")


def test_embedding_in_4_bits_is_refused(folder):
    change_map(folder / BASE_QMAP, lambda content: content.update({"model.embed_tokens": {"weights": "qint4"}}))
    assert_refused(folder, "base", ValueError, "embed_tokens")


# config.json


def change_settings(path, name, change):
    config = json.loads(path.read_text())
    config[name] = change(config[name])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("value", [{}, [], 5, "w4a16", True, {"llm": "w4a16"}, {"activations": "bfloat16"}], ids=str)
def test_precision_that_is_incomplete_is_named(value, folder):
    change_settings(folder / "genieblue/config.json", "quantization", lambda _: value)
    assert_refused(folder, "own", (ValueError, OSError), "quantization")


@pytest.mark.parametrize("value", [{"activations": None}, {"activations": "float7"}, {"activations": "nn"},
    {"activations": 16}, {"llm": None}, {"llm": "int4"}, {"llm": ["w4a16"]}, {"embeddings": 8}], ids=str)  # fmt: skip
def test_precision_that_is_unknown_is_named(value, folder):
    change_settings(folder / "genieblue/config.json", "quantization", lambda settings: settings | value)
    assert_refused(folder, "own", (ValueError, OSError), "quantization")


@pytest.mark.parametrize("value", [{"activations": None}, {"activations": "float7"}, {"activations": 16},
                                   {"quant_method": "quanto"}, {"quant_method": None}], ids=str)  # fmt: skip
def test_damaged_precision_of_a_base_is_refused(value, folder):
    change_settings(folder / "base/config.json", "quantization_config", lambda settings: settings | value)
    assert_refused(folder, "base", (ValueError, OSError))


def test_base_without_its_precision_is_refused(folder):
    """As for a stock class, there are no weights that could be read without it."""
    for value in (None, {}):
        change_settings(folder / "base/config.json", "quantization_config", lambda _, value=value: value)
        assert_refused(folder, "base", (ValueError, OSError))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5"])
@pytest.mark.parametrize("part", ["genieblue", "base"])
def test_broken_config_is_refused(part, content, folder):
    (folder / part / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="config.json"):
        load(folder / "genieblue")


@pytest.mark.parametrize("changes", [{"hidden_size": 96}, {"intermediate_size": 96}, {"num_hidden_layers": 3},
    {"num_hidden_layers": 5}, {"vocab_size": 100}, {"tie_word_embeddings": True}, {"attention_bias": True},
    {"num_key_value_heads": 4}], ids=str)  # fmt: skip
def test_config_of_another_base_is_refused(changes, folder):
    path = folder / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(folder, "base", ValueError)


@pytest.mark.parametrize("name", ["genieblue/model.safetensors", "genieblue/language_adapter/adapter_config.json",
    "genieblue/base_fingerprint.json", "base/config.json"])  # fmt: skip
def test_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises((ValueError, OSError), match=name.rsplit("/", 1)[-1]):
        load(folder / "genieblue")


def test_refused_folder_is_not_changed(folder):
    with changed_tensors(folder / ADAPTER) as tensors:
        del tensors[sorted(tensors)[0]]
    before = contents(folder)
    assert_refused(folder, "adapter", ValueError)
    assert contents(folder) == before


def test_refused_adapter_leaves_the_given_base_usable(tmp_path):
    good = quantized_pair(**MIXES["w8"])
    folder = own_copy(good, tmp_path)
    base = load_base(good / "base")
    with changed_tensors(folder / ADAPTER) as tensors:
        del tensors[quantized_names(tensors, "._data")[-1]]
    with pytest.raises(ValueError, match="missing"):
        load(folder / "genieblue", base_model=base)
    assert same(answers(load(good / "genieblue", base_model=base)), answers(load(good / "genieblue")))
