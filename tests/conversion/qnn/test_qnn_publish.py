"""Bundles on the Hub: one commit, front matter that the Hub reads, and what is refused before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, snapshot_download
from typer.testing import CliRunner

from conversion.qnn.bundle.metadata import FORMAT_VERSION, Bundle, list_files, signed
from conversion.qnn.bundle.publish import publish_bundle
from conversion.qnn.bundle.runtime_files import render_readme
from genieblue.cli.app import app

REPO = "you/reader-npu"


def verdict(result: str = "passed", accepted: bool = True) -> dict:
    return {"result": result, "accepted": accepted, "reasons": [], "remarks": [], "logits": {}, "answers": None}


def make_bundle(folder: Path, found: dict | None = None) -> Path:
    """A bundle with what publishing reads, and no graphs."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "soc": {"name": "sm8750", "title": "Snapdragon 8 Elite", "arch": 79},
        "compiler": "onnxruntime-qnn 1", "qairt": "2.30",
        "base": {"name_or_path": "maker/base", "license": {"id": "mit", "name": None, "link": None},
                 "languages": ["en"]},
        "adapter": {"lora": "constants"}, "chunk_length": 16, "cache_bits": 16, "llm": "w4a16", "weights": "4 bits",
        "eight_bits": {}, "bits_per_weight": 4.25, "rounding": "gptq", "vision": {"tiles": 1}, "parts": [{}],
        "embeddings": {"shape": [9, 4], "dtype": "uint16"}, "verdict": found or verdict(),
    }  # fmt: skip
    for name in ("vision/vision.bin", "language_0/language_0.bin", "processor/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "README.md").write_text(render_readme(metadata, has_float_graphs=False))
    (folder / "metadata.json").write_text(json.dumps(signed({**metadata, "files": list_files(folder)})))
    return folder


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_a_bundle_is_one_commit_with_front_matter_and_whole_after_a_download(hub, bundle, tmp_path):
    result = push(bundle, REPO)
    assert result.exit_code == 0, result.output
    assert len(hub.commits(REPO)) == 1
    card = ModelCard.load(REPO).data
    assert (card.license, card.base_model, card.base_model_relation) == ("mit", "maker/base", "quantized")
    assert (card.pipeline_tag, card.library_name, card.language) == ("image-text-to-text", "onnx", ["en"])
    assert {"genieblue", "qnn", "sm8750"} <= set(card.tags)
    assert Bundle(snapshot_download(REPO, local_dir=tmp_path / "again")).changed_files() == []


def test_the_next_bundle_leaves_no_file_of_the_last_one(hub, bundle, tmp_path):
    publish_bundle(bundle, REPO)
    shutil.move(bundle / "language_0", bundle / "language_1")
    other = make_bundle(tmp_path / "other")
    (other / "processor/tokenizer.json").rename(other / "processor/vocab.json")
    metadata = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps(signed({**metadata, "files": list_files(other)})))
    publish_bundle(other, REPO)
    assert "processor/tokenizer.json" not in hub.files(REPO) and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "vision/vision.bin").write_text("other content"), "vision.bin has 13 bytes"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "notes.txt").touch(), "notes.txt is not a file of the bundle"),
    ],
    ids=["changed", "missing", "more"],
)
def test_a_bundle_that_is_not_what_was_exported_is_refused(hub, bundle, damage, told):
    damage(bundle)
    with pytest.raises(ValueError, match=told):
        publish_bundle(bundle, REPO)
    assert ("model", REPO) not in hub.storage.repos


def test_a_failed_bundle_is_refused_and_says_so_itself_once_accepted(hub, tmp_path):
    failed = make_bundle(tmp_path / "bundle", verdict("failed", accepted=False))
    before = (failed / "metadata.json").read_bytes()
    result = push(failed, REPO)
    assert result.exit_code == 1 and "Quantization costs too much" in result.output
    assert push(failed, REPO, "--accept-loss").exit_code == 0
    assert (failed / "metadata.json").read_bytes() == before
    published = Bundle(snapshot_download(REPO, local_dir=tmp_path / "again"))
    assert published.changed_files() == [] and published.metadata["verdict"]["accepted"]
    assert "accepted by whoever exported it" in (tmp_path / "again/README.md").read_text()


def edit(folder: Path, *removed: str) -> str:
    """Adds a sentence to the README of a bundle, without lines that have one of the words; the new text."""
    path = folder / "README.md"
    kept = [line for line in path.read_text().splitlines() if not any(word in line for word in removed)]
    path.write_text("\n".join([*kept, "Made for Zürich's trams."]) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8")


def test_an_edited_readme_is_published(hub, bundle, tmp_path):
    edited = edit(bundle)
    result = push(bundle, REPO)
    assert result.exit_code == 0, result.output
    again = Path(snapshot_download(REPO, local_dir=tmp_path / "again"))
    assert (again / "README.md").read_text(encoding="utf-8") == edited
    assert Bundle(again).metadata["files"] == list_files(again)


@pytest.mark.parametrize("removed", [(), ("do not ship it",)], ids=["kept", "mark removed"])
def test_an_edited_readme_says_that_the_loss_was_accepted(hub, tmp_path, removed):
    failed = make_bundle(tmp_path / "bundle", verdict("failed", accepted=False))
    edit(failed, *removed)
    assert push(failed, REPO).exit_code == 1
    assert push(failed, REPO, "--accept-loss").exit_code == 0
    published = (Path(snapshot_download(REPO, local_dir=tmp_path / "again")) / "README.md").read_text(encoding="utf-8")
    assert published.count("accepted by whoever exported it") == 1 and "trams" in published
    assert "do not ship it" not in published and "verdict: failed, accepted" in published


def test_a_local_path_is_not_published(hub, bundle, tmp_path):
    metadata = json.loads((bundle / "metadata.json").read_text())
    for name, published in (("../../private/reader-2", "../reader-2"), ("you/reader-2", "you/reader-2")):
        changed = {**metadata, "model": {"name": name, "revision": None, "fingerprint": {"a": "b"}}}
        (bundle / "metadata.json").write_text(json.dumps(signed(changed)))
        publish_bundle(bundle, REPO)
        found = Bundle(snapshot_download(REPO, local_dir=tmp_path / "again"))
        assert found.metadata["model"] == {**changed["model"], "name": published} and not found.changed_files()


def test_another_model_s_repository_is_left_alone(hub, bundle):
    hub.commit(REPO, {"config.json": b"{}"})
    with pytest.raises(ValueError, match="already contains another model"):
        publish_bundle(bundle, REPO)


def test_a_bundle_takes_no_base(bundle):
    result = push(bundle, REPO, "--base", "you/base")
    assert result.exit_code == 2 and "leave out --base" in " ".join(result.output.replace("│", " ").split())
