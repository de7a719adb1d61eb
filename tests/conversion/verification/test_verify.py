"""`verify`: every check holds for a good model, and the right one fails when its thing is broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genieblue import change_adapter, save_tiny_pair, train_a_little
from tiny_models import save_tiny_base, tiny_tokenizer, tiny_vision_tower
from tiny_vlms import tiny_vlm_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.create import create_genieblue
from conversion.verification import verify
from conversion.verification.checks import CheckFailed
from conversion.verification.verify import CHECKS, ONLY_QUANTIZED, SavedModel, verify_model
from hub_cards.publish import publish_folder
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.as_built_genieblue import AsBuilt

ADAPTER = "language_adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("good")).parent


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A GenieBlue that a test may damage; its base lies beside it."""
    return shutil.copytree(good, tmp_path / "pair") / "genieblue"


@pytest.fixture
def run(monkeypatch):
    """Runs some checks by name, and returns the names of those that failed and all details."""

    def run_some(model, names, **options):
        monkeypatch.setattr(verify, "CHECKS", {name: CHECKS[name] for name in names.split()})
        checks = verify_model(model, **options)
        return [check.name for check in checks if not check.ok], "\n".join(check.detail for check in checks)

    return run_some


FILES = "folder own_files base_files language_adapter tokenizer"
RUNS = "text_view stock_peft"


def subject_of(folder: Path) -> SavedModel:
    return SavedModel(str(folder), None, None, {}, False, "auto", None)


@pytest.mark.parametrize(
    ("copies", "told"),
    [(0, "LoRA of rank 2 to 4 and no copied block,"), (4, "no LoRA and copies of the blocks 0, 1, 2, 3,")],
)
def test_ranks_and_copies_are_told_as_they_are(copies, told, run, tmp_path):
    vlm, base = tiny_vlm_pair("llava")
    ranks = {} if copies else {"model.layers.0.mlp.up_proj": 2}
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = GenieBlueForConditionalGeneration.from_vlm(
        vlm, base, replicated_layers=list(range(copies)), lora_rank=4, rank_pattern=ranks or None
    )
    model.save_pretrained(tmp_path / "mine")
    failed, details = run(str(tmp_path / "mine"), "language_adapter")
    assert failed == [] and told in details


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_check_holds_for_a_good_model(folder):
    seen = []
    checks = verify_model(folder, on_check=seen.append)
    assert [check.name for check in checks] == [
        "folder", "own_files", "base_files", "language_adapter", "tokenizer", "answer_boundaries", "text_view",
        "stock_peft", "remote_code",
    ]  # fmt: skip
    assert [check.detail for check in checks if not check.ok] == []
    assert seen == checks


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3"])
def test_bases_of_other_families_in_16_bits_pass(tmp_path, run, family):
    folder = save_tiny_pair(tmp_path, family, dtype=torch.bfloat16)
    failed, details = run(folder, f"{FILES} {RUNS}")
    assert failed == [], details
    assert "bfloat16" in details


def test_a_model_on_the_hub_is_verified_at_its_commit(hub, tmp_path):
    save_tiny_base("llama", tmp_path / "base")
    hub.commit_folder("maker/base", tmp_path / "base")
    tiny_vision_tower().save_pretrained(tmp_path / "vision")
    create_genieblue("maker/base", tmp_path / "vision", tmp_path / "reader")
    train_a_little(tmp_path / "reader")
    commit = publish_folder(tmp_path / "reader", "you/reader").oid
    hub.commit("you/reader", {"adapter_config.json": b"{}", "config.json": b"{}"})
    checks = verify_model("you/reader", revision=commit)
    assert [check.detail for check in checks if not check.ok] == []


def test_a_root_adapter_is_seen_in_a_repository_too(hub, folder, run):
    hub.commit_folder("you/reader", folder)
    hub.commit("you/reader", {"adapter_config.json": b"{}", "onnx/model.onnx": b"", "pytorch_model.bin": b""})
    failed, details = run("you/reader", "folder")
    assert failed == ["folder"]
    assert "adapter_config.json is in the root" in details and "pytorch_model.bin" in details
    assert "model.onnx" not in details


# Its own files


@pytest.mark.parametrize("place", ["model.safetensors", ADAPTER])
def test_one_changed_bit_of_our_own_weights_is_found(place, folder, run):
    content = bytearray((folder / place).read_bytes())
    content[-1] ^= 1
    (folder / place).write_bytes(content)
    failed, details = run(folder, FILES)
    assert failed == ["own_files"] and f"sha256 of {place} is" in details and "save it again" in details


def test_files_that_people_edit_are_no_change_of_the_weights(folder, run):
    (folder / "README.md").write_text("# Mine")
    change_json(folder / "generation_config.json", max_new_tokens=5)
    change_json(folder / "config.json", my_note="edited by hand")
    failed, details = run(folder, "own_files")
    assert failed == [] and "not recorded" not in details


def test_a_folder_of_an_earlier_version_passes_and_verify_says_that_nothing_was_recorded(folder, run):
    change_json(folder / "config.json", weight_fingerprint=None)
    failed, details = run(folder, "own_files")
    assert failed == [] and "no sha256 of its weights is recorded" in details


def test_weights_that_another_program_wrote_anew_are_named(folder, run):
    names = {key: "model-00001-of-00001.safetensors" for key in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    failed, details = run(folder, "folder own_files")
    assert failed == [] and "model-00001-of-00001.safetensors is not recorded" in details


# The base


def test_one_changed_bit_of_the_base_is_found(folder, run):
    weights = folder.parent / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # far from any sampled value
    weights.write_bytes(content)
    failed, details = run(folder, f"{FILES} {RUNS}")
    assert failed == ["base_files"]
    assert "sha256 of model.safetensors" in details


def test_another_base_in_its_place_is_found(folder, run):
    save_tiny_base("llama", folder.parent / "base", seed=1)
    failed, _ = run(folder, f"{FILES} {RUNS}")
    assert failed == ["base_files", "text_view", "stock_peft"]


def test_files_of_the_base_must_be_exactly_the_recorded_ones(folder, run):
    base = folder.parent / "base"
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    names = load_file(base / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    failed, details = run(folder, "base_files")
    assert failed == ["base_files"]
    assert "model.safetensors is missing" in details and "00001 is not recorded" not in details


def test_a_model_without_recorded_hashes_is_not_proven(folder, run):
    change_json(folder / "config.json", base_model_fingerprint=None)
    failed, details = run(folder, "base_files")
    assert failed == ["base_files"] and "records no sha256" in details


def test_a_base_that_is_gone_fails_what_needs_it_and_no_more(folder):
    shutil.rmtree(folder.parent / "base")
    checks = verify_model(folder)
    assert len(checks) == len(CHECKS) - len(ONLY_QUANTIZED)
    assert [check.name for check in checks if check.ok] == ["folder", "own_files"]
    assert all(str(folder.parent.resolve() / "base") in check.detail for check in checks if not check.ok)


def test_a_base_elsewhere_can_be_named(folder, run):
    (folder.parent / "base").rename(folder.parent / "elsewhere")
    failed, details = run(folder, f"{FILES} {RUNS}", base=folder.parent / "elsewhere")
    assert failed == [], details


# The adapter


def test_a_missing_adapter_tensor_is_found(folder, run):
    change_tensors(folder / ADAPTER, lambda tensors: tensors.pop(sorted(tensors)[0]))
    failed, details = run(folder, f"{FILES} {RUNS}")
    assert failed == ["own_files", "language_adapter", "text_view", "stock_peft"]
    assert "1 tensors are missing (base_model.model.model.layers.0" in details


def test_an_unexpected_adapter_tensor_is_found(folder, run):
    change_tensors(folder / ADAPTER, lambda tensors: tensors.update({"base_model.model.lm_head.x": torch.ones(2)}))
    failed, details = run(folder, f"{FILES} {RUNS}")
    assert "language_adapter" in failed and "1 tensors are not expected (base_model.model.lm_head.x)" in details


def test_an_adapter_tensor_of_another_shape_is_found(folder, run):
    def widen(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    change_tensors(folder / ADAPTER, widen)
    failed, details = run(folder, "language_adapter")
    assert failed == ["language_adapter"] and "has shape [8, 32], expected [4, 32]" in details


def test_an_adapter_with_nan_is_found(folder, run):
    change_tensors(folder / ADAPTER, lambda tensors: tensors[sorted(tensors)[0]].view(-1)[0].fill_(float("nan")))
    failed, details = run(folder, "language_adapter stock_peft")
    assert failed == ["language_adapter", "stock_peft"] and "contains NaN" in details


def test_a_truncated_adapter_is_found(folder, run):
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-9])
    failed, details = run(folder, "language_adapter")
    assert failed == ["language_adapter"] and "truncated or damaged" in details


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"lora_alpha": 64}, ["stock_peft"]),
        ({"use_rslora": True}, ["stock_peft"]),
        ({"base_model_name_or_path": "somebody/else"}, []),
        ({"modules_to_save": ["layers.2"], "layers_to_transform": [0, 1, 3]}, ["stock_peft"]),
    ],
    ids=["alpha", "rslora", "base", "layers"],
)
def test_settings_that_stock_peft_would_take_otherwise_are_found(folder, run, changes, others):
    change_json(folder / "language_adapter/adapter_config.json", **changes)
    failed, details = run(folder, f"language_adapter {RUNS}")
    # Settings of which the model itself is made keep it from loading, so that further checks fail too.
    assert failed[0] == "language_adapter" and set(others) <= set(failed)
    assert all(f"adapter_config.json has {name}" in details for name in changes)


# The folder


@pytest.mark.parametrize("name", ["multi_modal_projector.linear_2.weight", "vision_tower.post_layernorm.bias"])
def test_weights_that_are_no_numbers_are_found(folder, run, name):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors[name].view(-1)[-1].fill_(float("nan")))
    failed, details = run(folder, "folder")
    assert failed == ["folder"] and f"NaN or infinity in {name}" in details


def test_an_adapter_config_in_the_root_is_found(folder, run):
    shutil.copy(folder / "language_adapter/adapter_config.json", folder)
    failed, details = run(folder, "folder")
    assert failed == ["folder"] and "adapter_config.json is in the root" in details


def test_weights_of_the_base_in_the_folder_are_found(folder, run):
    base = load_file(folder.parent / "base/model.safetensors")
    change_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"language_model.lm_head": base["lm_head.weight"]}),
    )
    failed, details = run(folder, "folder")
    assert failed == ["folder"] and "language_model.lm_head" in details


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "base.safetensors", "model.gguf", "language_adapter/adapter_model.bin"]
)
def test_weight_files_of_other_origin_are_found(folder, run, name):
    (folder / name).touch()
    failed, details = run(folder, "folder")
    assert failed == ["folder"] and name in details


def test_a_folder_that_is_no_genieblue_is_an_error(good, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        verify_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="model_type 'llama'"):
        verify_model(good / "base")


# What runs


def test_another_tokenizer_is_found(folder, run):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["France"])
    tokenizer.save_pretrained(folder)
    failed, details = run(folder, "tokenizer")
    assert failed == ["tokenizer"]
    assert "the vocabulary differs" in details and "'The capital of France is' becomes" in details


def test_another_chat_template_is_found(folder, run):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    failed, details = run(folder, "tokenizer")
    assert failed == ["tokenizer"] and "formatted differently" in details


def test_a_text_view_that_is_off_by_the_least_is_found(folder):
    subject = subject_of(folder)
    with torch.no_grad():
        weight = subject.model.language_model.lm_head.weight
        weight.copy_(weight * (1 + 1e-6))
    subject.model._as_built = AsBuilt(subject.model)  # a changed base is refused otherwise
    with pytest.raises(CheckFailed, match="logits of a prompt"):
        verify.check_text_view(subject)


def test_text_requests_in_the_multimodal_view_are_found(folder, monkeypatch):
    forward = GenieBlueForConditionalGeneration.forward
    monkeypatch.setattr(
        GenieBlueForConditionalGeneration,
        "forward",
        lambda self, *args, **kw: forward(self, *args, **kw | {"view": "multimodal"}),
    )
    with pytest.raises(CheckFailed, match="logits of a prompt"):
        verify.check_text_view(subject_of(folder))


def test_a_multimodal_view_that_stock_peft_does_not_give_is_found(folder):
    subject = subject_of(folder)
    change_adapter(subject.model, seed=1, scale=0.01)
    with pytest.raises(CheckFailed, match="differs from stock PEFT by"):
        verify.check_stock_peft(subject)


# The code


def break_syntax(folder: Path) -> None:
    (folder / "view_routing_genieblue.py").write_text("def broken(:\n")


def import_the_package(folder: Path) -> None:
    path = folder / "modeling_genieblue.py"
    path.write_text(path.read_text().replace("import copy\n", "import copy\nimport modeling_genieblue\n", 1))


BROKEN_CODE = {
    "syntax": (break_syntax, "SyntaxError"),
    "needs the package": (import_the_package, "modeling_genieblue"),
    "no auto_map": (lambda folder: change_json(folder / "config.json", auto_map={}), "model type `genieblue`"),
}


@pytest.mark.parametrize("case", BROKEN_CODE)
def test_code_that_does_not_load_by_itself_is_found(folder, run, case):
    damage, message = BROKEN_CODE[case]
    damage(folder)
    failed, details = run(folder, "remote_code")
    assert failed == ["remote_code"]
    assert message in details


def test_code_that_hangs_is_ended_and_told(folder, run, monkeypatch):
    path = folder / "modeling_genieblue.py"
    path.write_text("import time\ntime.sleep(600)\n" + path.read_text())
    monkeypatch.setattr(verify, "CLEAN_PROCESS_SECONDS", 1)
    failed, details = run(folder, "remote_code")
    assert failed == ["remote_code"]
    assert details.startswith("a clean process did not answer within 1 seconds")


def test_code_of_a_base_does_not_run_unless_it_is_allowed(tmp_path):
    folder = save_tiny_pair(tmp_path, "bluelm")
    ran = tmp_path / "ran"
    for code in (tmp_path / "base").glob("*.py"):
        code.write_text(f"open({str(ran)!r}, 'w').close()\n" + code.read_text())
    checks = verify_model(folder)
    assert not ran.exists()
    assert all("--trust-remote-code" in check.detail for check in checks if not check.ok)
    assert [check.name for check in checks if check.ok] == ["folder", "own_files"]


def test_a_base_with_code_of_its_own_passes_if_it_is_allowed(tmp_path, run):
    failed, details = run(save_tiny_pair(tmp_path, "bluelm"), f"{FILES} {RUNS}", trust_remote_code=True)
    assert failed == [], details
