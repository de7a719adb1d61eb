"""What `publish_folder` refuses before anything is sent, and which files it would send."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from handmade_folder import change_json, write_handmade_folder, write_json
from safetensors.numpy import load_file, save_file

from hub_cards import model_folder, one_commit
from hub_cards.publish import files_to_publish, find_problems, publish_folder
from modeling_genieblue.model_files_genieblue import file_sha256, own_weight_places

WHOLE = [
    "base_fingerprint.json",
    "config.json",
    "configuration_genieblue.py",
    "image_processing_genieblue.py",
    "language_adapter/adapter_config.json",
    "language_adapter/adapter_model.safetensors",
    "model.safetensors",
    "modeling_genieblue.py",
    "processing_genieblue.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "views_genieblue.py",
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_handmade_folder(tmp_path / "reader")


def shard_weights(folder: Path) -> None:
    """Replaces `model.safetensors` by two shards and their index."""
    (folder / "model.safetensors").unlink()
    names = {
        "vision_tower.a": "model-00001-of-00002.safetensors",
        "multi_modal_projector.b": "model-00002-of-00002.safetensors",
    }
    for tensor, file in names.items():
        save_file({tensor: np.zeros(3, np.float32)}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})


def test_a_whole_folder_has_no_problem_and_all_of_it_is_sent(folder):
    assert find_problems(folder) == []
    assert files_to_publish(folder) == WHOLE


def test_sharded_weights_are_whole_too(folder):
    shard_weights(folder)
    assert find_problems(folder) == []
    sent = [name for name in files_to_publish(folder) if name.startswith("model")]
    assert sent == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_genieblue.py",
    ]


def test_what_is_no_part_of_the_model_stays_at_home_and_is_named(folder, caplog):
    (folder / "checkpoint-100").mkdir()
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "base.safetensors",
        "notes.py",
        ".env",
        "checkpoint-100/model.safetensors",
        "language_adapter/optimizer.pt",
    ):
        (folder / name).write_text("private")
    assert files_to_publish(folder) == WHOLE
    for name in ("checkpoint-100", "optimizer.pt", "training_args.bin", "base.safetensors", "notes.py"):
        assert name in caplog.text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.safetensors", "neither model.safetensors nor"),
        ("language_adapter/adapter_config.json", "adapter is incomplete.*adapter_config.json"),
        ("language_adapter/adapter_model.safetensors", "adapter is incomplete.*adapter_model.safetensors"),
        ("modeling_genieblue.py", "Code files are missing: modeling_genieblue.py"),
        ("views_genieblue.py", "Code files are missing: views_genieblue.py"),  # only imported, not in an auto_map
        ("image_processing_genieblue.py", "Code files are missing: image_processing_genieblue.py"),
        ("processor_config.json", "The processor is missing"),
        ("tokenizer.json", "The tokenizer is missing"),
        ("tokenizer_config.json", "The tokenizer is missing"),
    ],
)
def test_a_missing_file_is_refused(folder, name, problem):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=problem):
        publish_folder(folder, "you/reader")


def test_another_kind_of_model_is_refused(folder):
    change_json(folder / "config.json", model_type="llama")
    with pytest.raises(ValueError, match="'llama', expected 'genieblue'"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("missing", ["folder", "config.json"])
def test_what_is_no_model_folder_is_refused(folder, missing):
    shutil.rmtree(folder) if missing == "folder" else (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match="folder"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("weights", ["model.safetensors", "language_adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("lost", [1, 100_000], ids=["last-byte", "header"])
def test_truncated_weights_are_refused(folder, weights, lost):
    content = (folder / weights).read_bytes()
    (folder / weights).write_bytes(content[:-lost] if lost < len(content) else content[:20])
    with pytest.raises(ValueError, match=f"{Path(weights).name}.*(truncated|header)"):
        publish_folder(folder, "you/reader")


def test_weights_with_bytes_too_many_are_refused(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="its header describes"):
        publish_folder(folder, "you/reader")


def test_an_adapter_config_in_the_root_is_refused_with_the_reason(folder):
    shutil.copy(folder / "language_adapter/adapter_config.json", folder)
    with pytest.raises(ValueError, match="would load the base"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("base", ["../base", "base", "/data/base"])
def test_a_local_base_is_refused(tmp_path, base):
    folder = write_handmade_folder(tmp_path / "reader", base_model_name_or_path=base, base_model_revision=None)
    (folder / "base").mkdir()
    with pytest.raises(ValueError, match="local path that nobody else has"):
        publish_folder(folder, "you/reader")


def test_a_base_that_is_not_recorded_is_refused(tmp_path):
    folder = write_handmade_folder(tmp_path / "reader", base_model_name_or_path=None, base_model_revision=None)
    with pytest.raises(ValueError, match="base is not recorded"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("revision", [None, "main", "0123456"])
def test_a_base_that_is_not_pinned_to_a_commit_is_refused(tmp_path, revision):
    folder = write_handmade_folder(tmp_path / "reader", base_model_revision=revision)
    with pytest.raises(ValueError, match="expected a 40-digit commit"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("change", [{"base_model_name_or_path": "/home/me/base"}, {"revision": None}])
def test_an_adapter_for_another_base_than_the_config_names_is_refused(folder, change):
    change_json(folder / "language_adapter/adapter_config.json", **change)
    with pytest.raises(ValueError, match="must name the same base"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("place", ["model.safetensors", "language_adapter/adapter_model.safetensors"])
def test_weights_other_than_those_that_were_saved_are_refused(folder, place):
    fingerprint = {name: file_sha256(folder / name) for name in own_weight_places(folder)}
    change_json(folder / "config.json", weight_fingerprint=fingerprint)
    assert find_problems(folder) == []
    (folder / place).write_bytes((folder / place).read_bytes()[:-1] + b"\1")
    (problem,) = find_problems(folder)
    assert f"sha256 of {place} is" in problem and "save it again" in problem


def test_an_adapter_that_was_never_trained_is_refused(folder):
    path = folder / "language_adapter/adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for value, refused in ((0, True), (1e-3, False)):
        save_file({**load_file(path), name: np.full((4, 2), value, np.float32)}, path)
        assert any("The language model is untrained" in problem for problem in find_problems(folder)) == refused


def test_weights_of_the_base_are_refused(folder):
    tensors = {
        "vision_tower.a": np.zeros(2, np.float32),
        "multi_modal_projector.b": np.zeros(2, np.float32),
        "language_model.model.embed_tokens.weight": np.zeros(2, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="language_model.model.embed_tokens.weight.*the base's weights are never"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("weights", ["model.safetensors", "language_adapter/adapter_model.safetensors"])
def test_weights_that_are_no_numbers_are_refused(folder, weights, value):
    tensors = load_file(folder / weights)
    name = sorted(tensors)[-1]
    tensors[name].flat[-1] = value
    save_file(tensors, folder / weights)
    with pytest.raises(ValueError, match=f"NaN or infinity in {name}:"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_told_from_what_is_none_in_every_precision(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(model_folder, "NUMBERS_AT_A_TIME", 3)
    limits = torch.finfo(dtype)
    good = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0, 1.5, -2.0], dtype=dtype)
    tensors = {"good": good, "codes": torch.full((4,), -1, dtype=torch.int64), "one": torch.tensor(1.0, dtype=dtype)}
    for value in ("nan", "inf", "-inf"):
        tensors[value] = torch.cat([good, torch.tensor([float(value)], dtype=dtype)])
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    assert model_folder.not_finite(tmp_path / "weights.safetensors") == ["-inf", "inf", "nan"]


def test_weights_without_a_vision_tower_are_refused(folder):
    save_file({"multi_modal_projector.b": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="weights are missing vision_tower"):
        publish_folder(folder, "you/reader")


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    shard_weights(folder)
    save_file({"vision_tower.other": np.zeros(3, np.float32)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="disagree about vision_tower.a, vision_tower.other"):
        publish_folder(folder, "you/reader")


def test_an_index_that_points_out_of_the_folder_is_refused(folder):
    shard_weights(folder)
    index = {"weight_map": {"vision_tower.a": "../secret.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="next to it"):
        publish_folder(folder, "you/reader")


def test_a_config_without_auto_map_is_refused(folder):
    change_json(folder / "config.json", auto_map=None)
    with pytest.raises(ValueError, match="no auto_map entry for AutoModel"):
        publish_folder(folder, "you/reader")


@pytest.mark.parametrize(
    ("name", "problem"), [("modeling_genieblue.py", "not valid Python"), ("processor_config.json", "not valid JSON")]
)
def test_a_file_that_cannot_be_read_is_named(folder, name, problem):
    (folder / name).write_text("def :")
    with pytest.raises(ValueError, match=f"{name}.*{problem}"):
        publish_folder(folder, "you/reader")


def test_all_problems_are_told_at_once(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    change_json(folder / "config.json", base_model_revision=None)
    assert len(find_problems(folder)) == 4  # revision, weights, an adapter with another revision, tokenizer


def test_nothing_is_sent_or_written_when_there_is_a_problem(folder, monkeypatch):
    def no_hub(*args, **kwargs):
        raise AssertionError("The Hub was asked before the folder was checked.")

    monkeypatch.setattr(one_commit, "HfApi", no_hub)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="nothing was uploaded"):
        publish_folder(folder, "you/reader")
    assert not (folder / "README.md").exists()
