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
# Weights of 4 and of 8 bits in each part.
MIX = {"lm_head": "w8a16", "embeddings": "w8a16", "vision_tower": "w4a16"}
W8 = {"llm": "w8a16", "rounding": "rtn"}
# What GenieBlue's own file and a base's go through, and what an adapter does.
TREES = ("base", "adapter")


@pytest.fixture
def folder(tmp_path):
    return own_copy(quantized_pair(**MIX), tmp_path)


def assert_refused(folder, part, error, *words):
    """By the loading itself, without the check of the base; in the base alone, too."""
    loads = [lambda: load(folder / "genieblue", check_base=False)]
    if part == "base":
        loads.append(lambda: load_base(folder / "base"))
    for attempt in loads:
        with pytest.raises(error) as caught:
            attempt()
        for word in words:
            assert word in str(caught.value), str(caught.value)


def stored(tensors, ending):
    """The first stored part of a quantized weight (not of LoRA, whose form is another)."""
    return next(name for name in sorted(tensors) if name.endswith(ending) and "lora" not in name)


# Tensors


@pytest.mark.parametrize("part", TREES)
def test_every_missing_tensor_counts(part, folder):
    endings = ("._data._data", ".weight._data", "._scale", "._shift", ".input_scale", ".output_scale", "norm.weight")
    with changed_tensors(folder / FILES[part][0]) as tensors:
        missing = {next(name for name in sorted(tensors) if name.endswith(ending)) for ending in endings}
        for name in missing:
            del tensors[name]
    assert_refused(folder, part, ValueError, f"{min(missing)} is missing", f"and {len(missing) - 4} more")


@pytest.mark.parametrize(("part", "extra"), [("base", None), ("adapter", None), ("adapter", "nothing.weight")])
def test_unexpected_tensor_is_named(extra, part, folder):
    with changed_tensors(folder / FILES[part][0]) as tensors:
        # By default the weight itself, beside its codes.
        extra = extra or stored(tensors, ".input_scale").replace("input_scale", "weight")
        tensors[extra] = torch.ones(4, 4)
    assert_refused(folder, part, ValueError, extra, "not expected")


@pytest.mark.parametrize(("part", "ending"), [
    ("base", "._data._data"), ("base", "embed_tokens.weight._data"), ("base", "._scale"), ("base", "._shift"),
    ("adapter", "._data._data"),
])  # fmt: skip
def test_tensor_of_another_shape_is_named(ending, part, folder):
    with changed_tensors(folder / FILES[part][0]) as tensors:
        name = stored(tensors, ending)
        tensors[name] = tensors[name].t().contiguous()
    assert_refused(folder, part, ValueError, name, "expected")


@pytest.mark.parametrize("part", TREES)
def test_groups_of_a_size_that_we_do_not_write_are_named(part, folder):
    """In order in themselves: of each group the scale of its parts is the same."""
    with changed_tensors(folder / FILES[part][0]) as tensors:
        name = stored(tensors, "._data._data").removesuffix("._data._data")
        codes = tensors[f"{name}._data._data"]
        tensors[f"{name}._data._data"] = codes.reshape(-1, 16)
        for other in ("_scale", "_shift"):
            tensors[f"{name}.{other}"] = tensors[f"{name}.{other}"].repeat_interleave(codes.shape[1] // 16, 0)
    assert_refused(folder, part, ValueError, f"{name}._data._data", "expected")


@pytest.mark.parametrize(("part", "ending", "dtype"), [
    ("base", "._data._data", torch.int8), ("base", "embed_tokens.weight._data", torch.uint8),
    ("base", "._scale", torch.int8), ("base", ".input_scale", torch.complex64), ("base", "norm.weight", torch.int8),
    ("adapter", "._data._data", torch.bfloat16), ("adapter", "norm.weight", torch.int8),
], ids=str)  # fmt: skip
def test_numbers_of_another_kind_are_named(dtype, ending, part, folder):
    with changed_tensors(folder / FILES[part][0]) as tensors:
        name = stored(tensors, ending)
        tensors[name] = tensors[name].to(dtype)
    assert_refused(folder, part, ValueError, name, "expected")


def test_lora_of_another_shape_or_kind_is_named(folder):
    with changed_tensors(folder / ADAPTER) as tensors:
        first, second = sorted(name for name in tensors if "lora_A" in name and name.endswith("._data"))[:2]
        tensors[first] = tensors[first][:-1].clone()
        tensors[second] = tensors[second].to(torch.float32)
    assert_refused(folder, "adapter", ValueError, first, second)


@pytest.mark.parametrize(("part", "damage"), [
    ("own", "half"), ("own", "empty"), ("adapter", "zeros"), ("base", "text"), *((part, "missing") for part in FILES)
])  # fmt: skip
def test_damaged_file_is_named(damage, part, folder):
    path = folder / FILES[part][0]
    content = path.read_bytes()
    damaged = {
        "half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content)),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }  # fmt: skip
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    assert_refused(folder, part, OSError, path.name)


@pytest.mark.parametrize("part", TREES)
def test_file_of_another_precision_is_refused(part, folder):
    """Each alone is in order: they do not belong together."""
    (folder / FILES[part][0]).write_bytes((quantized_pair(**W8) / FILES[part][0]).read_bytes())
    assert_refused(folder, part, ValueError, FILES[part][0].rsplit("/", 1)[-1])


# Quantization maps


@pytest.mark.parametrize(("part", "content"), [
    *((part, b"{") for part in FILES), ("own", b"[]"), ("own", b'{"x": 1}'), ("own", b'{"x": {}}'),
    ("own", b'{"x": {"weights": []}}'), ("own", b'{"x": {"weights": "qint2"}}'),
])  # fmt: skip
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


@pytest.mark.parametrize(("part", "name"), [
    ("base", "no.such.layer"), ("base", ""), ("base", "model.norm"), ("base", "model.layers.0..self_attn"),
    ("base", "model.layers.0.self_attn.q_proj.weight"), ("own", "vision_tower.embeddings.patch_embedding"),
    ("adapter", "no.such.layer"), ("adapter", "base_model.model.model.layers.0.self_attn.q_proj"),
    ("adapter", "base_model.model.model.layers.3.input_layernorm"),
])  # fmt: skip
def test_map_that_names_what_is_no_linear_is_refused(name, part, folder):
    change_map(folder / FILES[part][1], lambda content: content.update({name: {"weights": "qint8"}}))
    assert_refused(folder, part, ValueError, name)


@pytest.mark.parametrize("part", TREES)
def test_map_without_a_layer_is_refused(part, folder):
    removed = []
    change_map(folder / FILES[part][1], lambda content: removed.append(content.popitem()[0]))
    assert_refused(folder, part, ValueError, removed[0].rsplit(".", 1)[-1])


@pytest.mark.parametrize("part", FILES)
def test_empty_map_is_refused(part, folder):
    (folder / FILES[part][1]).write_text("{}")
    assert_refused(folder, part, ValueError, "missing")


@pytest.mark.parametrize("part", TREES)
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


@pytest.mark.parametrize("value", [{}, "w4a16", {"activations": "bfloat16"}], ids=str)
def test_precision_that_is_incomplete_is_named(value, folder):
    change_settings(folder / "genieblue/config.json", "quantization", lambda _: value)
    assert_refused(folder, "own", (ValueError, OSError), "quantization")


@pytest.mark.parametrize("value", [{"activations": "float7"}, {"llm": ["w4a16"]}, {"embeddings": 8}], ids=str)
def test_precision_that_is_unknown_is_named(value, folder):
    change_settings(folder / "genieblue/config.json", "quantization", lambda settings: settings | value)
    assert_refused(folder, "own", (ValueError, OSError), "quantization")


@pytest.mark.parametrize(
    "value", [{"activations": "float7"}, {"quant_method": "quanto"}, {"quant_method": None}], ids=str
)
def test_damaged_precision_of_a_base_is_refused(value, folder):
    change_settings(folder / "base/config.json", "quantization_config", lambda settings: settings | value)
    assert_refused(folder, "base", (ValueError, OSError))


def test_base_without_its_precision_is_refused(folder):
    """As for a stock class, there are no weights that could be read without it."""
    for value in (None, {}):
        change_settings(folder / "base/config.json", "quantization_config", lambda _, value=value: value)
        assert_refused(folder, "base", (ValueError, OSError))


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("part", ["genieblue", "base"])
def test_broken_config_is_refused(part, content, folder):
    (folder / part / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="config.json"):
        load(folder / "genieblue")


@pytest.mark.parametrize("changes", [{"hidden_size": 96}, {"num_hidden_layers": 3},
    {"num_hidden_layers": 5}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)  # fmt: skip
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
    good = quantized_pair(**W8)
    folder = own_copy(good, tmp_path)
    base = load_base(good / "base")
    with changed_tensors(folder / ADAPTER) as tensors:
        del tensors[stored(tensors, "._data")]
    with pytest.raises(ValueError, match="missing"):
        load(folder / "genieblue", base_model=base)
    assert same(answers(load(good / "genieblue", base_model=base)), answers(load(good / "genieblue")))
