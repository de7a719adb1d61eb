"""`verify` of quantized models: every check holds for a good one, and the right one fails when its thing is broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_quantized import large_pair, load_base, save_large_pair
from typer.testing import CliRunner

from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import quantize_genieblue
from conversion.verification import verify
from conversion.verification.verify import CHECKS, verify_model
from genieblue.cli.app import app
from hub_cards.publish import publish_folder
from hub_cards.publish_base import publish_quantized_base

OWN, ADAPTER = "genieblue/model.safetensors", "genieblue/language_adapter/quantized_adapter.safetensors"
BASE = "base/quantized_model.safetensors"
NAMES = [
    "folder", "own_files", "base_files", "language_adapter", "tokenizer", "answer_boundaries", "text_view",
    "quantization", "verdict", "remote_code",
]  # fmt: skip
WITHOUT_CODE = "folder own_files base_files language_adapter tokenizer text_view stock_peft"


def make(folder: Path, source: Path, self_contained: bool = False, **recipe) -> Path:
    recipe = QuantizationRecipe(**recipe)
    place = {"self_contained": True} if self_contained else {"base_output": folder / "base"}
    quantize_genieblue(source, folder / "genieblue", recipe, **(place if recipe.changes_base else {}))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(large_pair().parent, folder / "source")
    return make(folder, folder / "source/genieblue")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A self-contained quantized GenieBlue: only to be read."""
    return make(tmp_path_factory.mktemp("whole"), large_pair(), self_contained=True) / "genieblue"


@pytest.fixture
def pair(good, tmp_path) -> Path:
    """`genieblue`, its `base` and its `source`, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "pair"))


@pytest.fixture
def run(monkeypatch):
    """Runs some checks by name, and returns the names of those that failed and all details."""

    def run_some(model, names=WITHOUT_CODE, **options):
        monkeypatch.setattr(verify, "CHECKS", {name: CHECKS[name] for name in names.split()})
        checks = verify_model(model, **options)
        return [check.name for check in checks if not check.ok], "\n".join(check.detail for check in checks)

    return run_some


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_quantization(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization"].update(changes))


def change_tensors(path: Path, ending: str, change) -> None:
    """Changes the first tensor whose name ends so, in place."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors[next(name for name in sorted(tensors) if name.endswith(ending))])
    save_file(tensors, path, metadata)


def flip_last_byte(path: Path) -> None:
    """The last tensor of a file is one of codes."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# Good ones


def test_every_check_holds_for_a_good_model(pair):
    checks = verify_model(pair / "genieblue")
    assert [check.name for check in checks] == NAMES
    assert [check.detail for check in checks if not check.ok] == []
    details = {check.name: check.detail for check in checks}
    assert "measured again against" in details["quantization"] and "multimodal view 0." in details["quantization"]
    assert "llm w4a16" in details["quantization"] and "vision_tower w8a16" in details["quantization"]
    assert "bit for bit" in details["text_view"]
    assert "its base alone, a LlamaForCausalLM, gives the text view's logits" in details["remote_code"]


RECIPES = {
    "w8": {"llm": "w8a16"},
    "mixed": {"llm": "w8a16", "replicated_blocks": "w4a16", "lora": "w16a16", "vision_tower": "w4a16"},
    "head": {"lm_head": "w8a16"},
    "head alone": {"llm": "w16a16", "lm_head": "w8a16", "embeddings": "w8a16"},
    "own parts": {"llm": "w16a16", "replicated_blocks": "w8a16"},
    "float32": {"activations": "float32"},
    "small groups": {"group_size": 32},
}


@pytest.mark.parametrize("case", RECIPES)
def test_every_mix_of_precisions_passes(tmp_path, run, case):
    failed, details = run(make(tmp_path, large_pair(), **RECIPES[case]) / "genieblue")
    assert failed == [], details


def test_groups_of_another_size_than_recorded_fail(pair, run):
    change_quantization(pair / "genieblue", group_size=32)
    failed, details = run(pair / "genieblue")
    assert failed == ["quantization"]
    assert "has groups of 64, by config.json 32" in details and "the base's config.json has group_size 64" in details


def test_a_tied_head_and_embedding_in_8_bits_pass(tmp_path, run):
    source = save_large_pair(tmp_path / "source", tie_word_embeddings=True)
    failed, details = run(make(tmp_path, source, lm_head="w8a16", embeddings="w8a16") / "genieblue")
    assert failed == [], details


def test_layers_that_stay_at_another_precision_pass(tmp_path, run):
    source = save_large_pair(tmp_path / "source", intermediate_size=176)  # 4 bits need a multiple of 32 inputs
    folder = make(tmp_path, source) / "genieblue"
    assert any("down_proj" in name for name in json.loads((folder / "config.json").read_text())["quantization"]
               ["other_precision"])  # fmt: skip
    failed, details = run(folder)
    assert failed == [], details


def test_weight_files_beside_those_of_an_inner_base_are_found(whole, tmp_path, run):
    folder = Path(shutil.copytree(whole, tmp_path / "whole"))
    shutil.copy(folder / "base/quantized_model.safetensors", folder / "base/more.safetensors")
    failed, details = run(folder, "folder")
    assert failed == ["folder"] and "base/more.safetensors" in details


def test_a_self_contained_one_passes(whole):
    checks = verify_model(whole)
    assert [check.detail for check in checks if not check.ok] == []
    assert "the base in ./base" in checks[0].detail


def test_on_the_hub_both_kinds_pass(hub, pair, whole):
    publish_quantized_base(pair / "base", "you/base-w4a16")
    publish_folder(pair / "genieblue", "you/reader-w4a16", base="you/base-w4a16")
    publish_folder(whole, "you/whole-w4a16")
    for repo in ("you/reader-w4a16", "you/whole-w4a16"):
        checks = verify_model(repo)
        assert [check.detail for check in checks if not check.ok] == []
        assert "is a folder on the computer where it was made" in checks[NAMES.index("quantization")].detail
        assert "its base alone" in checks[NAMES.index("remote_code")].detail


def test_code_of_a_base_on_the_hub_that_is_not_ours_does_not_run(hub, whole, run, tmp_path):
    hub.commit_folder("you/whole", whole)
    code = (whole / "base/quantized_base_genieblue.py").read_text()
    ran = tmp_path / "ran"
    hub.commit("you/whole", {"base/quantized_base_genieblue.py": f"open({str(ran)!r}, 'w')\n{code}".encode()})
    failed, details = run("you/whole", "remote_code")
    assert failed == [] and "its base alone" not in details and not ran.exists()


# The error


def test_the_error_is_measured_against_the_16_bit_model(pair, run):
    failed, details = run(pair / "genieblue", "stock_peft")
    recorded = json.loads((pair / "genieblue/measurements.json").read_text())
    values = {row["name"].split()[3]: row["value"][:5] for row in recorded}
    assert failed == []
    assert f"text view {values['text']}, multimodal view {values['multimodal']}" in details


def test_the_error_is_measured_against_a_16_bit_model_on_the_hub(hub, pair, tmp_path, run):
    publish_base = hub.commit_folder("maker/base-llm", pair / "source/base-llm")
    publish_folder(pair / "source/genieblue", "you/reader", base=f"maker/base-llm@{publish_base}")
    quantize_genieblue("you/reader", tmp_path / "whole", self_contained=True)
    hub.commit("you/reader", {"config.json": b"{}"})
    publish_folder(tmp_path / "whole", "you/whole")
    for model in (tmp_path / "whole", "you/whole"):
        failed, details = run(model, "stock_peft")
        assert failed == [] and "measured again against you/reader:" in details
    card = (tmp_path / "whole/README.md").read_text()
    assert "base_model: you/reader" in card and "base_model_relation: quantized" in card


def test_without_the_16_bit_model_the_recorded_error_is_told_as_such(pair, run):
    shutil.rmtree(pair / "source")
    failed, details = run(pair / "genieblue", "stock_peft")
    assert failed == []
    assert "as recorded, not measured again (the folder" in details and "relative L2" in details
    (pair / "genieblue/measurements.json").unlink()
    assert "neither recorded nor measured" in run(pair / "genieblue", "stock_peft")[1]


def test_a_16_bit_model_that_it_was_not_made_from_is_found(pair, run):
    path = pair / "source/base-llm/model.safetensors"
    tensors = load_file(path)
    save_file({name: value.flip(0) for name, value in tensors.items()}, path, {"format": "pt"})
    for file in ("config.json", "base_fingerprint.json"):
        edit_json(pair / "source/genieblue" / file, lambda content: content.pop("base_model_fingerprint", None))
    fingerprint_of(pair / "source")
    failed, details = run(pair / "genieblue", "stock_peft")
    assert failed == ["quantization"] and "are unrelated to those in 16 bits" in details


def fingerprint_of(source: Path) -> None:
    """Lets a 16-bit GenieBlue accept the base beside it."""
    from transformers import AutoModelForCausalLM

    from modeling_genieblue.base_identity_genieblue import tensor_samples

    samples = tensor_samples(AutoModelForCausalLM.from_pretrained(source / "base-llm"))
    (source / "genieblue/base_fingerprint.json").write_text(json.dumps(samples))


def test_stock_peft_does_not_load_the_adapter(pair):
    with pytest.raises(ValueError, match="Repo id must"):  # it finds no file of its own here, and turns to the Hub
        PeftModel.from_pretrained(load_base(pair / "base"), str(pair / "genieblue"), subfolder="language_adapter")


# Damage


def test_one_flipped_code_of_the_base_is_found_by_its_hash(pair, run):
    flip_last_byte(pair / BASE)
    failed, details = run(pair / "genieblue", "base_files")
    assert failed == ["base_files"] and "sha256 of quantized_model.safetensors" in details


def test_a_base_that_records_other_weights_of_its_own_is_found(pair, run):
    record = {"quantized_model.safetensors": "0" * 64}
    edit_json(
        pair / "base/config.json", lambda config: config["quantization_config"].update(weight_fingerprint=record)
    )
    failed, details = run(pair / "genieblue", "base_files")
    assert failed == ["base_files"] and "the base's own config.json records 0000" in details


@pytest.mark.parametrize("file", [OWN, ADAPTER])
def test_one_flipped_code_of_our_own_is_found_by_its_hash(file, pair, run):
    flip_last_byte(pair / file)
    failed, details = run(pair / "genieblue", "folder own_files base_files language_adapter")
    assert failed == ["own_files"] and f"sha256 of {file.removeprefix('genieblue/')} is" in details


IMPOSSIBLE = {
    "NaN scale": ("lora_B.weight._scale", lambda tensor: tensor.fill_(float("nan")), "NaN or infinity"),
    "zero scale": ("gate_proj.weight._scale", lambda tensor: tensor[0].zero_(), "not positive"),
    "zero point": ("_shift", lambda tensor: tensor.view(-1)[0].fill_(16), "zero point above 15"),
    "code": ("lora_A.weight._data", lambda tensor: tensor.view(-1)[0].fill_(-128), "code below -127"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_numbers_that_no_rounding_gives_are_found_in_the_adapter(pair, run, case):
    ending, change, message = IMPOSSIBLE[case]
    change_tensors(pair / ADAPTER, ending, change)
    failed, details = run(pair / "genieblue", "language_adapter")
    assert failed == ["language_adapter"] and message in details


def test_numbers_that_no_rounding_gives_are_found_in_the_vision_tower(pair, run):
    change_tensors(pair / OWN, "q_proj.weight._scale", lambda tensor: tensor[0].fill_(float("inf")))
    failed, details = run(pair / "genieblue", "folder stock_peft")
    assert failed == ["folder", "quantization"] and "q_proj.weight._scale contains NaN or infinity" in details


@pytest.mark.parametrize(
    ("part", "precision"),
    [("llm", "w8a16"), ("replicated_blocks", "w8a16"), ("lora", "w16a16"), ("vision_tower", "w16a16"),
     ("multi_modal_projector", "w4a16"), ("lm_head", "w8a16")],
)  # fmt: skip
def test_a_precision_that_is_not_the_stored_one_is_found(pair, run, part, precision):
    change_quantization(pair / "genieblue", **{part: precision})
    failed, _ = run(pair / "genieblue")
    assert "quantization" in failed


def test_a_layer_whose_other_precision_is_not_listed_is_found(pair, run):
    change_quantization(pair / "genieblue", other_precision={})
    failed, details = run(pair / "genieblue", "stock_peft")
    assert failed == ["quantization"] and "patch_embedding" in details


@pytest.mark.parametrize(
    ("name", "expected"),
    [("genieblue/quanto_qmap.json", "text_view"), ("genieblue/language_adapter/quanto_qmap.json", "language_adapter"),
     ("base/quanto_qmap.json", "language_adapter")],
)  # fmt: skip
def test_a_missing_map_is_found(pair, run, name, expected):
    (pair / name).unlink()
    failed, details = run(pair / "genieblue")
    assert expected in failed and "quantization" in failed and "quanto_qmap.json" in details


def test_a_missing_adapter_tensor_is_found(pair, run):
    tensors = load_file(pair / ADAPTER)
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("._scale")))
    save_file(tensors, pair / ADAPTER)
    failed, details = run(pair / "genieblue", "language_adapter")
    assert failed == ["language_adapter"] and "_scale is missing" in details


def test_another_base_is_found(pair, tmp_path, run):
    other = make(tmp_path / "other", save_large_pair(tmp_path / "large", "qwen2"))
    shutil.rmtree(pair / "base")
    shutil.copytree(other / "base", pair / "base")
    failed, _ = run(pair / "genieblue")
    assert {"base_files", "text_view", "quantization"} <= set(failed)


def test_a_16_bit_base_in_its_place_is_found(pair, run):
    failed, details = run(pair / "genieblue", base=pair / "source/base-llm")
    assert {"base_files", "text_view", "quantization"} <= set(failed)
    assert "is for a base quantized to w4a16" in details


def test_a_file_that_stock_peft_would_load_is_found(pair, run):
    save_file({"x": torch.ones(2)}, pair / "genieblue/language_adapter/adapter_model.safetensors")
    failed, details = run(pair / "genieblue", "stock_peft")
    assert failed == ["quantization"] and "adapter_model.safetensors exists" in details


def test_a_base_whose_own_code_is_broken_is_found(pair, run):
    (pair / "base/quantized_base_genieblue.py").write_text("def broken(:\n")
    failed, details = run(pair / "genieblue", "remote_code")
    assert failed == ["remote_code"] and "SyntaxError" in details


def test_the_command_ends_with_1(pair, monkeypatch):
    def no_process(*_):
        raise verify.CheckFailed("no process of its own in this test")

    monkeypatch.setattr(verify, "_run_clean_process", no_process)
    flip_last_byte(pair / BASE)
    result = CliRunner().invoke(app, ["verify", str(pair / "genieblue"), "--json"])
    checks = {check["name"]: check["ok"] for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 1 and list(checks) == NAMES and not checks["base_files"]
