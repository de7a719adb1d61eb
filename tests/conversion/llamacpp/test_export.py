"""`export_llamacpp`: the files, what they hold, and what is refused. llama.cpp itself runs in tests/clients."""

import numpy
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tiny_genieblue import change_adapter, save_tiny_pair
from tiny_models import save_tiny_base, tiny_tokenizer, tiny_vision_tower
from tiny_quantized import contents, leftovers
from transformers import AutoModelForCausalLM

from conversion.llamacpp.adapter import FAMILIES, interleave
from conversion.llamacpp.export import export_llamacpp
from conversion.llamacpp.vision import IMAGE_PREFIX, IMAGE_SUFFIX
from conversion.lora_form import export_lora
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.saving_genieblue import processor_for


def save_pair(folder, family="llama", *, side=32, prefix=IMAGE_PREFIX, suffix=IMAGE_SUFFIX, **tower):
    """A trained-looking GenieBlue that llama.cpp can run as it is, unless the arguments say otherwise."""
    save_tiny_base(family, folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    vision = tiny_vision_tower(image_size=side, **tower)
    model = change_adapter(GenieBlueForConditionalGeneration.from_base(base, vision, lora_rank=4))
    texts = {"image_prefix": prefix, "image_suffix": suffix}
    model.save_pretrained(folder / "genieblue", processor=processor_for(model.config, tiny_tokenizer(), **texts))
    return folder / "genieblue"


def read(path):
    reader = GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return settings, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and a GenieBlue: only to be read."""
    return save_pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_llamacpp(llama, folder / "gguf", rank=6)
    export_lora(llama, folder / "lora", rank=6)
    return folder


def test_the_folder_is_complete(exported):
    assert leftovers(exported) == ["gguf", "lora"]
    assert leftovers(exported / "gguf") == [
        "README.md",
        "genieblue_export.json",
        "lora.gguf",
        "mmproj.gguf",
        "spectrum.png",
    ]
    card = (exported / "gguf/README.md").read_text()
    assert (
        "--mmproj mmproj.gguf --image-min-tokens 4 --image-max-tokens 4" in card and "Logits of this adapter" in card
    )


def test_the_adapter_is_the_lora_form_with_interleaved_q_and_k(exported):
    settings, tensors = read(exported / "gguf/lora.gguf")
    assert settings["general.type"] == "adapter" and settings["general.architecture"] == "llama"
    assert settings["adapter.type"] == "lora" and settings["adapter.lora.alpha"] == 16
    form = load_file(exported / "lora/adapter_model.safetensors")
    assert len(tensors) == len(form)
    prefix = "base_model.model.model.layers.3."
    assert torch.equal(tensors["blk.3.ffn_up.weight.lora_b"], form[prefix + "mlp.up_proj.lora_B.weight"])
    assert torch.equal(tensors["blk.3.attn_q.weight.lora_a"], form[prefix + "self_attn.q_proj.lora_A.weight"])
    for name, heads in (("q", 4), ("k", 2)):
        rows = form[f"{prefix}self_attn.{name}_proj.lora_B.weight"]
        stored = tensors[f"blk.3.attn_{name}.weight.lora_b"]
        assert torch.equal(stored, interleave(rows, heads)) and not torch.equal(stored, rows)


def test_interleaved_rows_come_in_turn_from_both_halves_of_each_head():
    assert interleave(torch.arange(8)[:, None], 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_mmproj_is_the_vision_side_without_its_pooling_head(llama, exported):
    settings, tensors = read(exported / "gguf/mmproj.gguf")
    assert settings["clip.projector_type"] == "lfm2" and settings["clip.vision.projector.scale_factor"] == 2
    assert settings["clip.vision.image_size"] == 32 and settings["clip.vision.patch_size"] == 8
    model = GenieBlueForConditionalGeneration.from_pretrained(llama)
    own = {name: value for name, value in model.state_dict().items() if name.startswith(("vision_tower.", "multi_"))}
    kept = {name: value for name, value in own.items() if not name.startswith("vision_tower.head.")}
    assert len(tensors) == len(kept)
    assert torch.equal(tensors["mm.1.weight"], own["multi_modal_projector.linear_1.weight"])
    assert torch.equal(tensors["mm.input_norm.bias"], own["multi_modal_projector.norm.bias"])
    assert torch.equal(tensors["v.patch_embd.weight"], own["vision_tower.embeddings.patch_embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_genieblue_gives_files_in_its_dtype(llama, tmp_path, dtype):
    export_llamacpp(llama, tmp_path / "gguf", dtype=dtype)
    for name, tensor in (("lora", "blk.3.ffn_up.weight.lora_b"), ("mmproj", "mm.1.weight")):
        types = {each.name: each.tensor_type.name for each in GGUFReader(tmp_path / f"gguf/{name}.gguf").tensors}
        assert types[tensor] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert types.get("v.position_embd.weight", "F32") == "F32"


def test_a_language_side_alone_needs_nothing_of_the_vision_side(tmp_path):
    source = save_tiny_pair(tmp_path)
    export_llamacpp(source, tmp_path / "gguf", language_only=True)
    assert "mmproj.gguf" not in leftovers(tmp_path / "gguf")
    assert "It sees no images by itself" in (tmp_path / "gguf/README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"side": 24}, "24 pixels wide, and llama.cpp scales it to a multiple of 16"),
        ({"prefix": ""}, r"writes '' and '<\|image_end\|>', .*genieblue init --image-prefix"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
    ],
    ids=["size", "texts", "activation"],
)
def test_a_vision_side_that_llama_cpp_would_run_differently_is_refused(tmp_path, changed, told):
    source = save_pair(tmp_path, **changed)
    with pytest.raises(ValueError, match=told):
        export_llamacpp(source, tmp_path / "gguf")
    assert leftovers(tmp_path) == ["base", "genieblue"]


def test_a_base_that_llama_cpp_stores_in_an_unknown_way_is_refused_with_the_way_to_go(tmp_path):
    source = save_tiny_pair(tmp_path, "stablelm")
    with pytest.raises(ValueError, match="type 'stablelm'.*convert_lora_to_gguf.py"):
        export_llamacpp(source, tmp_path / "gguf", language_only=True)
    assert leftovers(tmp_path) == ["base", "genieblue"]


def write_base(path, base, *, architecture="llama", change=0.0, without=""):
    """A GGUF file with the norms of a base alone."""
    writer = GGUFWriter(path, architecture)
    names = {"model.norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for key, value in base.state_dict().items():
        own = next((other for name, other in names.items() if name in key), None)
        if own is not None and own != without:
            name = own if own == "output_norm" else f"blk.{key.split('.')[2]}.{own}"
            writer.add_tensor(f"{name}.weight", (value + change).numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"architecture": "qwen2"}, "holds a model of type 'qwen2', expected 'llama'"),
        ({"change": 0.3}, "differs from the base's by"),
        ({"without": "ffn_norm"}, "has no blk.0.ffn_norm.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_gguf_of_another_model_is_refused(llama, tmp_path, wrong, told):
    base = AutoModelForCausalLM.from_pretrained(llama.parent / "base")
    write_base(tmp_path / "base.gguf", base)
    export_llamacpp(llama, tmp_path / "right", base_gguf=tmp_path / "base.gguf")
    write_base(tmp_path / "wrong.gguf", base, **wrong)
    with pytest.raises(ValueError, match=told):
        export_llamacpp(llama, tmp_path / "gguf", base_gguf=tmp_path / "wrong.gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a file of weights"])
def test_a_damaged_gguf_is_refused(llama, tmp_path, content):
    if content is not None:
        (tmp_path / "base.gguf").write_bytes(content)
    with pytest.raises(OSError, match="base.gguf"):
        export_llamacpp(llama, tmp_path / "gguf", base_gguf=tmp_path / "base.gguf")


def test_only_the_output_is_written(llama, tmp_path):
    before = contents(llama.parent)
    export_llamacpp(llama, tmp_path / "gguf")
    assert contents(llama.parent) == before


def test_the_families_have_names_in_gguf():
    assert {name: family.name for name, family in FAMILIES.items()} == {
        "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"
    }  # fmt: skip
