"""The LoRA form: stock PEFT on the plain base gives the multimodal view, and what it cannot carry is said."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_genieblue import IMAGE, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import save_tiny_base
from tiny_quantized import contents, large_pair, leftovers, quantized_pair
from torch import nn
from transformers import AutoModelForCausalLM

from conversion import lora_form
from conversion.absorbed_norms import CopiedBlock
from conversion.lora_form import export_lora
from conversion.merge import export_merged
from conversion.quantization.error import logits_error
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import ADAPTER

# What no LoRA carries, by the end of its name, in copied blocks of these families.
CARRIED_BY_NONE = {
    "llama": [],
    "qwen2": ["q_proj.bias", "k_proj.bias", "v_proj.bias"],
    "qwen3": ["q_norm.weight", "k_norm.weight"],
    "mistral": [],
    "gemma3_text": [
        "q_norm.weight", "k_norm.weight", "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
    ],
    "phi3": [],
    "cohere": [],
    "stablelm": [
        "q_proj.bias", "k_proj.bias", "v_proj.bias", "input_layernorm.bias", "post_attention_layernorm.bias"
    ],
    "bluelm": [],
}  # fmt: skip
CHATS = [
    {"input_ids": row(*prompt(6, seed=seed)[0].tolist(), IMAGE, 9, 40), "pixel_values": tiles(1, seed)}
    for seed in range(3)
]


def load(folder):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=True)


@torch.no_grad()
def logits(model):
    return model(prompt(12), use_cache=False).logits[0]


def error(exact, other) -> float:
    return logits_error(exact, other)[0]


def facts(folder):
    return json.loads((folder / "genieblue_export.json").read_text())


@torch.no_grad()
def give_copies_what_no_lora_carries(model, endings) -> None:
    """Puts the base's values in the place of the copies' parameters whose names end so."""
    for block in model.multimodal_language_model.modules():
        if hasattr(block, "modules_to_save"):
            for name, own in block.modules_to_save[ADAPTER].named_parameters():
                if name.endswith(tuple(endings)):
                    own.copy_(block.original_module.get_parameter(name))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and a trained-looking GenieBlue: only to be read."""
    return save_tiny_pair(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", CARRIED_BY_NONE)
def test_stock_peft_on_the_plain_base_gives_the_multimodal_view_at_full_rank(tmp_path, family):
    save_tiny_base(family, tmp_path / "base")
    model = tiny_genieblue(base=load_base(tmp_path))
    if family != "stablelm":  # biases of norms go through the gains: another test
        give_copies_what_no_lora_carries(model, CARRIED_BY_NONE[family])
    model.save_pretrained(tmp_path / "genieblue")
    form = export_lora(tmp_path / "genieblue", tmp_path / "lora", trust_remote_code=True)
    peft = PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "lora")
    if family != "stablelm":
        assert form.left_behind == {}
        assert error(logits(model.multimodal_language_model), logits(peft)) < 1e-4
    with peft.disable_adapter():
        assert torch.equal(logits(peft), logits(load_base(tmp_path)))
    merged = logits(peft)
    assert error(merged, logits(peft.merge_and_unload())) < 1e-4


@pytest.mark.parametrize("family", [name for name, endings in CARRIED_BY_NONE.items() if endings])
def test_what_no_lora_carries_is_named_with_its_cost(tmp_path, family):
    source = save_tiny_pair(tmp_path, family)
    exact = logits(load(source).multimodal_language_model)
    form = export_lora(source, tmp_path / "lora")
    endings = {
        next(ending for ending in CARRIED_BY_NONE[family] if name.endswith(ending)) for name in form.left_behind
    }
    assert endings == set(CARRIED_BY_NONE[family]) and min(form.left_behind.values()) > 0
    names = [measurement.name for measurement in form.measurements]
    assert "Logits without what no LoRA carries, everything else exact" in names
    # At full rank that is all that is lost.
    assert form.measurements[-1].value == form.measurements[-2].value
    assert error(exact, logits(PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "lora"))) > 1e-3


def test_rank_pattern_alone_gives_each_matrix_its_rank(llama, tmp_path):
    form = export_lora(llama, tmp_path / "lora", rank=6)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["alpha_pattern"] == {} and config["r"] == 4
    assert config["rank_pattern"] == {f"model.layers.3.{each.name}": 6 for each in form.matrices}
    ranks = {name: value.shape[0] for name, value in load_file(tmp_path / "lora/adapter_model.safetensors").items()
             if "lora_A" in name}  # fmt: skip
    assert set(ranks.values()) == {4, 6} and len(ranks) == 4 * 7


@pytest.mark.parametrize("chats", [None, CHATS], ids=["weights", "outputs"])
def test_error_is_kept_by_every_matrix_with_the_least_rank(llama, tmp_path, chats):
    form = export_lora(llama, tmp_path / "lora", error=0.2, calibration=chats)
    assert all(each.error <= 0.2 for each in form.matrices)
    tighter = export_lora(llama, tmp_path / "tighter", error=0.1, calibration=chats)
    assert sum(each.rank for each in tighter.matrices) > sum(each.rank for each in form.matrices)
    assert ("calibration chats" in form.measurements[-1].how) == (chats is not None)


def test_max_bytes_bounds_the_file(llama, tmp_path):
    largest = export_lora(llama, tmp_path / "full").bytes
    smaller = export_lora(llama, tmp_path / "lora", max_bytes=largest * 3 // 4)
    assert largest // 2 < smaller.bytes <= largest * 3 // 4


def test_ranks_fitted_to_outputs_lose_less_on_the_chats_than_ranks_fitted_to_weights(llama, tmp_path):
    model = load(llama)
    chats = [
        {"input_ids": row(*prompt(20, seed=seed)[0].tolist(), IMAGE, 9), "pixel_values": tiles(1, seed)}
        for seed in range(8)
    ]
    embeds = [model.embed_request(chat["input_ids"], chat["pixel_values"]) for chat in chats]

    @torch.no_grad()
    def of_chats(view):
        return torch.cat([view(inputs_embeds=each, use_cache=False).logits[0] for each in embeds])

    exact, errors = of_chats(model.multimodal_language_model), {}
    for name, calibration in (("weights", None), ("outputs", chats)):
        export_lora(llama, tmp_path / name, rank=8, calibration=calibration)
        errors[name] = error(exact, of_chats(PeftModel.from_pretrained(load_base(llama.parent), tmp_path / name)))
    assert errors["outputs"] < errors["weights"]


def test_only_the_output_is_written(llama, tmp_path):
    before = contents(llama.parent)
    export_lora(llama, tmp_path / "lora", rank=2)
    assert contents(llama.parent) == before
    assert leftovers(tmp_path) == ["lora"]
    assert leftovers(tmp_path / "lora") == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "genieblue_export.json", "spectrum.png"
    ]  # fmt: skip


def test_a_half_precision_genieblue_gives_an_adapter_in_its_dtype(tmp_path):
    source = save_tiny_pair(tmp_path, dtype=torch.bfloat16)
    export_lora(source, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert error(
        logits(load(source).multimodal_language_model).float(),
        logits(PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "lora")).float(),
    ) < 0.05  # fmt: skip


# Refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 4, "error": 0.1}, "rank and error each choose the ranks"),
        ({"rank": 0}, "`rank` is 0"),
        ({"error": 1.5}, "`error` is 1.5"),
        ({"max_bytes": 0}, "`max_bytes` is 0"),
        ({"max_bytes": 30000}, "30,000 bytes cannot hold rank 1 .* 7 matrices .* the least is"),
        ({"calibration": []}, "There are no calibration chats"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_met_are_refused(llama, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        export_lora(llama, tmp_path / "lora", **options)
    assert leftovers(tmp_path) == []


def test_an_output_that_exists_stays_as_it_is(llama, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/mine.txt").write_text("mine")
    with pytest.raises(OSError, match="already exists: give a new folder"):
        export_lora(llama, tmp_path / "lora")
    assert leftovers(tmp_path / "lora") == ["mine.txt"]


@pytest.mark.parametrize("part", ["genieblue", "base"])
def test_an_output_inside_the_input_is_refused(llama, part):
    before = contents(llama.parent)
    with pytest.raises(ValueError, match="is inside the input"):
        export_lora(llama, llama.parent / part / "lora")
    assert contents(llama.parent) == before


def test_a_quantized_genieblue_is_refused_with_the_way_to_go(tmp_path):
    with pytest.raises(ValueError, match="is already quantized .* give the 16-bit GenieBlue it was made"):
        export_lora(quantized_pair() / "genieblue", tmp_path / "lora")


def test_a_quantized_base_is_refused_with_the_way_to_go(tmp_path):
    base = quantized_pair() / "base"
    with pytest.raises(ValueError, match="is quantized .* load it in 16 or 32 bits"):
        export_lora(large_pair(), tmp_path / "lora", base_model=base, check_base=False)
    assert leftovers(tmp_path) == []


def test_an_untrained_language_side_is_refused(tmp_path):
    save_tiny_base("llama", tmp_path / "base")
    tiny_genieblue(base=load_base(tmp_path), trained=False).save_pretrained(tmp_path / "genieblue")
    with pytest.raises(ValueError, match="untrained, .* train stage 2 first"):
        export_lora(tmp_path / "genieblue", tmp_path / "lora")


@pytest.mark.parametrize("export", [export_lora, export_merged])
@pytest.mark.parametrize("kind", [".lora_A.", ".mlp.up_proj.weight"], ids=["lora", "copy"])
def test_weights_that_are_no_numbers_are_refused_by_name(llama, tmp_path, export, kind):
    source = shutil.copytree(llama.parent, tmp_path / "pair") / "genieblue"
    path = source / "language_adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if kind in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    del settings["weight_fingerprint"]  # as saved by a training that went wrong
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"contain NaN or infinity \(\S+\), so an export would be of no use"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_at_its_end_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_form, "write_export_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_lora(llama, tmp_path / "lora")
    assert leftovers(tmp_path) == []


def test_a_trained_matrix_that_is_no_linear_layer_is_refused():
    class Experts(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.weights = nn.Parameter(torch.full((2, 3, 3), value))

    with pytest.raises(ValueError, match=r"weights of the copied blocks has shape \[2, 3, 3\]"):
        CopiedBlock(Experts(1.0), Experts(2.0), [], {}).left_behind()


def test_a_gain_of_zero_in_the_base_is_left_behind():
    def block(gain: list[float]) -> nn.Module:
        made = nn.ModuleDict({"norm": nn.RMSNorm(4), "proj": nn.Linear(4, 4, bias=False)})
        made["norm"].weight.data.copy_(torch.tensor(gain))
        return made

    original, changed = block([1.0, 0.0, 2.0, 1.0]), block([1.0, 0.5, 2.0, 1.0])
    copied = CopiedBlock(original, changed, ["proj"], {"proj": "norm"})
    assert copied.gains == {} and list(copied.left_behind()) == ["norm.weight"]
