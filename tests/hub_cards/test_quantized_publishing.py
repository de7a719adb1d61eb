"""Quantized models on the Hub: the base by itself, GenieBlues on it, self-contained ones, and their cards."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clean_process import ask, run_clean
from huggingface_hub import ModelCard, hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file
from test_card_code import WITHOUT_PACKAGE
from tiny_genieblue import prompt, save_tiny_pair
from tiny_quantized import contents, large_pair, load, load_base, own_copy, quantized_pair, save_large_pair
from typer.testing import CliRunner

from conversion.quantization.bases import record_verdict, write_quantized_base_card
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import quantize_genieblue
from conversion.verification.verify_base import verify_quantized_base
from genieblue.cli.app import app
from hub_cards.model_card import card_info_from_folder, render_model_card
from hub_cards.publish import find_problems, publish_folder
from hub_cards.publish_base import base_files_to_publish, find_base_problems, publish_quantized_base
from modeling_genieblue import GenieBlueForConditionalGeneration

REPO, BASE = "you/reader-w4a16", "you/base-w4a16"
SOURCE = "you/reader"


@pytest.fixture
def pair(tmp_path) -> Path:
    """`genieblue` and `base`, quantized, to be damaged."""
    return own_copy(quantized_pair(), tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A self-contained quantized GenieBlue: only to be read."""
    folder = tmp_path_factory.mktemp("whole") / "genieblue"
    quantize_genieblue(large_pair(), folder, self_contained=True)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forget_weights(base: Path) -> None:
    """Leaves a base without a record of its weights, like those of earlier versions."""
    settings = json.loads((base / "config.json").read_text())["quantization_config"]
    del settings["weight_fingerprint"]
    edit_json(base / "config.json", quantization_config=settings)


def flip_last_code(base: Path) -> None:
    path = base / "quantized_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def push(*arguments: str):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


# Two commands


def test_base_and_genieblue_are_published_and_load_in_a_clean_process_at_their_commits(hub, pair, tmp_path):
    before = contents(pair)
    result = push(pair / "base", BASE)
    assert result.exit_code == 0, result.output
    result = push(pair / "genieblue", REPO, "--base", BASE)
    assert result.exit_code == 0, result.output
    base_commit, commit = (hub.commits(repo)[-1].sha for repo in (BASE, REPO))
    assert [len(hub.commits(repo)) for repo in (BASE, REPO)] == [1, 1]
    assert contents(pair) == before  # the folders stay as they are
    config, adapter = (
        json.loads(hub.files(REPO)[name]) for name in ("config.json", "language_adapter/adapter_config.json")
    )
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == (BASE, base_commit)
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE, base_commit)
    # Of where it was quantized no more than a folder's name is told.
    here = json.loads(before["genieblue/config.json"])["quantization"]["source"]["name"]
    assert here.startswith("../../") and config["quantization"]["source"]["name"] == f"../{Path(here).name}"

    # Later commits reach neither.
    hub.commit(BASE, {"config.json": b"{}"})
    hub.commit(REPO, {"config.json": b"{}"})
    answered = run_clean(
        f"""
        from transformers import AutoModel, AutoModelForCausalLM
        model = AutoModel.from_pretrained({REPO!r}, revision={commit!r}, trust_remote_code=True)
        base = AutoModelForCausalLM.from_pretrained({BASE!r}, revision={base_commit!r}, trust_remote_code=True)
        ids = torch.arange(20, 29)[None]
        with torch.no_grad():
            equal = torch.equal(model(ids).logits, base(ids).logits)
        answer([ask(model), equal])
        """,
        tmp_path,
        hub.env(),
    )
    assert answered == [ask(load(pair / "genieblue")), True]


def test_a_self_contained_one_needs_one_command(hub, whole, tmp_path):
    result = push(whole, REPO)
    assert result.exit_code == 0, result.output
    assert json.loads(hub.files(REPO)["config.json"])["base_model_name_or_path"] == "./base"
    commit = hub.commits(REPO)[-1].sha
    hub.commit(REPO, {"config.json": b"{}", "base/config.json": b"{}"})
    answered = run_clean(
        f"""
        from transformers import AutoModel
        answer(ask(AutoModel.from_pretrained({REPO!r}, revision={commit!r}, trust_remote_code=True)))
        """,
        tmp_path,
        hub.env(),
    )
    assert answered == ask(load(whole))


LOST = {"result": "failed", "accepted": False, "reasons": ["the text view loses 9 points"]}


def verdict_on_hub(hub, repo: str, folder: str = "") -> tuple[dict, str]:
    """The verdict of a quantized base on the Hub, and its card."""
    files = hub.files(repo)
    settings = json.loads(files[f"{folder}config.json"])["quantization_config"]
    return settings["verdict"], files[f"{folder}README.md"].decode()


def test_an_accepted_loss_of_a_base_is_published_as_accepted(hub, pair):
    record_verdict(pair / "base", LOST)
    before = contents(pair)
    assert push(pair / "base", BASE).exit_code == 1 and ("model", BASE) not in hub.storage.repos
    result = push(pair / "base", BASE, "--accept-loss")
    assert result.exit_code == 0, result.output
    verdict, card = verdict_on_hub(hub, BASE)
    assert verdict["accepted"] and "costs**: failed, accepted; the text view loses 9 points" in card
    assert contents(pair) == before
    (check,) = [check for check in verify_quantized_base(BASE) if check.name == "verdict"]
    assert check.ok


def test_an_accepted_loss_is_that_of_the_base_inside_too(hub, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "lost"))
    record_verdict(folder / "base", LOST)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    edit_json(folder / "config.json", quantization=settings | {"verdict": LOST})
    before = contents(folder)
    publish_folder(folder, REPO, accept_loss=True)
    assert json.loads(hub.files(REPO)["config.json"])["quantization"]["verdict"]["accepted"]
    verdict, card = verdict_on_hub(hub, REPO, "base/")
    assert verdict["accepted"] and "costs**: failed, accepted; the text view" in card
    assert contents(folder) == before


def test_a_base_inside_stays_as_it_is_without_a_loss(hub, whole):
    publish_folder(whole, REPO, accept_loss=True)
    for name in ("base/config.json", "base/README.md"):
        assert hub.files(REPO)[name] == (whole / name).read_bytes()


def test_a_loaded_self_contained_model_is_pushed_with_its_base(hub, whole):
    load(whole).push_to_hub(REPO)
    files = hub.files(REPO)
    for name in ("model.safetensors", "base/quantized_model.safetensors", "language_adapter/quanto_qmap.json"):
        assert files[name] == (whole / name).read_bytes()
    again = GenieBlueForConditionalGeneration.from_pretrained(REPO)
    again.push_to_hub("you/again")
    assert hub.files("you/again")["base/quantized_model.safetensors"] == files["base/quantized_model.safetensors"]


def test_a_self_contained_one_can_name_a_published_base_instead(hub, whole):
    publish_quantized_base(whole / "base", BASE)
    publish_folder(whole, REPO, base=BASE)
    assert not any(name.startswith("base/") for name in hub.files(REPO))
    assert find_problems(whole) == []


def test_an_unquantized_genieblue_can_name_its_published_base_too(hub, tmp_path):
    folder = save_tiny_pair(tmp_path)
    with pytest.raises(ValueError, match="--base you/base"):
        publish_folder(folder, "you/reader")
    first = hub.commit_folder("maker/base", folder.parent / "base")
    hub.commit("maker/base", {"model.safetensors": b"other"})
    publish_folder(folder, "you/reader", base=f"maker/base@{first}")
    assert json.loads(hub.files("you/reader")["config.json"])["base_model_revision"] == first
    published = GenieBlueForConditionalGeneration.from_pretrained("you/reader")
    local = load(folder)
    assert torch.equal(published(prompt()).logits, local(prompt()).logits)


@pytest.mark.parametrize("missing", [False, True], ids=["other bytes", "no such file"])
def test_a_base_with_other_bytes_is_refused_before_anything_is_sent(hub, pair, missing):
    files = {} if missing else {"quantized_model.safetensors": b"other"}
    hub.commit(BASE, {"config.json": b"{}", **files})
    with pytest.raises(ValueError, match="sha256 of quantized_model.safetensors"):
        publish_folder(pair / "genieblue", REPO, base=BASE)
    assert ("model", REPO) not in hub.storage.repos


def test_unquantized_weights_beside_the_recorded_ones_would_be_loaded_and_are_refused(hub, pair):
    hub.commit_folder(BASE, pair / "base")
    hub.commit(BASE, {"model.safetensors": b"other"})
    with pytest.raises(ValueError, match="sha256 of model.safetensors"):
        publish_folder(pair / "genieblue", REPO, base=BASE)


def test_what_is_no_hub_id_is_refused_as_base(hub, pair):
    with pytest.raises(ValueError, match="is not a Hub id"):
        publish_folder(pair / "genieblue", REPO, base="../base")


def test_a_base_has_no_base(hub, pair):
    result = push(pair / "base", BASE, "--base", "you/other")
    assert result.exit_code == 2 and "is a base itself" in result.output


def test_one_flipped_code_of_a_base_is_noticed_at_load_from_the_hub(hub, pair):
    flip_last_code(pair / "base")
    hub.commit_folder(BASE, pair / "base")
    with pytest.raises(ValueError, match="quantized_model.safetensors of you/base-w4a16 has sha256 .* quantize the"):
        load_base(BASE)
    forget_weights(pair / "base")
    hub.commit_folder(BASE, pair / "base")
    load_base(BASE)  # of an earlier version


# Checks


def drop_map_entry(path: Path) -> None:
    entries = json.loads(path.read_text())
    entries.pop(sorted(entries)[0])
    path.write_text(json.dumps(entries))


BASE_DAMAGES = {
    "no weights": (lambda base: (base / "quantized_model.safetensors").unlink(), "safetensors is missing"),
    "truncated": (lambda base: (base / "quantized_model.safetensors").write_bytes(b"x" * 100), "safetensors header"),
    "flipped code": (flip_last_code, "sha256 of quantized_model.safetensors is .* recorded is"),
    "no map": (lambda base: (base / "quanto_qmap.json").unlink(), "quanto_qmap.json is missing"),
    "another map": (lambda base: drop_map_entry(base / "quanto_qmap.json"), "disagree about"),
    "no code": (lambda base: (base / "quantized_linears_genieblue.py").unlink(), "Code files are missing"),
    "no auto_map": (lambda base: edit_json(base / "config.json", auto_map={}), "AutoModelForCausalLM"),
    "no tokenizer": (lambda base: (base / "tokenizer.json").unlink(), "tokenizer is missing"),
    "16-bit weights": (
        lambda base: (base / "model.safetensors").touch(),
        "would be loaded instead of the quantized weights",
    ),
}


@pytest.mark.parametrize("case", BASE_DAMAGES)
def test_a_base_that_nobody_could_load_is_refused(hub, pair, case):
    damage, message = BASE_DAMAGES[case]
    damage(pair / "base")
    with pytest.raises(ValueError, match=message):
        publish_quantized_base(pair / "base", BASE)
    assert ("model", BASE) not in hub.storage.repos


def test_a_whole_base_has_no_problem_and_what_is_no_part_of_it_stays_at_home(pair, caplog):
    (pair / "base/notes.txt").write_text("private")
    goes_along = {"USE_POLICY.md", "MODEL_LICENSE", "BLUELM_LICENSE.txt", "tekken.json", "tokenizer.model.v3", "a.spm"}
    for name in goes_along:
        (pair / "base" / name).write_text("of the base")
    assert find_base_problems(pair / "base") == []
    published = set(base_files_to_publish(pair / "base"))
    assert "notes.txt" not in published and "notes.txt" in caplog.text
    assert goes_along <= published


def test_a_tied_head_is_stored_once_and_has_no_problem(tmp_path):
    source = save_large_pair(tmp_path / "source", tie_word_embeddings=True)
    recipe = QuantizationRecipe(lm_head="w8a16", embeddings="w8a16")
    quantize_genieblue(source, tmp_path / "reader", recipe, base_output=tmp_path / "base")
    assert find_base_problems(tmp_path / "base") == []


def test_a_repository_with_another_model_is_left_alone(hub, pair):
    hub.commit(BASE, {"model.safetensors": b"mine"})
    with pytest.raises(ValueError, match="already contains another model"):
        publish_quantized_base(pair / "base", BASE)
    assert len(hub.commits(BASE)) == 1


def test_an_unquantized_folder_is_no_quantized_base(tmp_path):
    with pytest.raises(ValueError, match="not a base quantized by GenieBlue"):
        publish_quantized_base(large_pair().parent / "base-llm", BASE)


@pytest.mark.parametrize("name", ["quanto_qmap.json", "language_adapter/quanto_qmap.json"])
def test_a_genieblue_without_one_of_its_maps_is_refused(whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / name).unlink()
    assert ["quanto_qmap.json is missing" in problem for problem in find_problems(folder)] == [True]


def test_an_inner_base_that_was_changed_is_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    weights = folder / "base/quantized_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert ["recorded is" in problem for problem in find_problems(folder)] == [True]
    forget_weights(folder / "base")  # another base's, as it says itself
    assert ["recorded sha256" in problem for problem in find_problems(folder)] == [True]


def test_a_quantized_adapter_that_was_never_trained_is_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    path = folder / "language_adapter/quantized_adapter.safetensors"
    tensors = load_file(path)
    save_file({name: value * 0 if name.endswith("lora_B.weight._data") else value for name, value in tensors.items()},
              path)  # fmt: skip
    assert ["The language model is untrained" in problem for problem in find_problems(folder)] == [True]


# Sizes


def test_info_tells_precisions_and_sizes_of_a_folder_and_of_the_hub_alike(hub, pair, whole):
    publish_quantized_base(pair / "base", BASE)
    publish_folder(pair / "genieblue", REPO, base=BASE)
    publish_folder(whole, "you/whole")
    found = [json.loads(CliRunner().invoke(app, ["info", str(model), "--json"]).stdout)["parts"]
             for model in (pair / "genieblue", REPO, whole, "you/whole")]  # fmt: skip
    assert found[0] == found[1] == found[2] == found[3]
    assert {name: part["precision"] for name, part in found[0].items()} == {
        "language_model": "w4a16", "vision_tower": "w8a16", "multi_modal_projector": "w8a16",
        "replicated_blocks": "w4a16", "lora": "w8a16",
    }  # fmt: skip
    plain = json.loads(CliRunner().invoke(app, ["info", str(large_pair()), "--json"]).stdout)["parts"]
    assert {name: part["parameters"] for name, part in plain.items()} == {
        name: part["parameters"] for name, part in found[0].items()
    }
    table = CliRunner().invoke(app, ["info", str(whole)]).output
    assert re.search(r"part +precision +parameters", table) and "stored in a folder of this GenieBlue" in table


# Cards


def test_cards_say_what_each_was_made_from(hub, pair):
    edit_json(
        pair / "genieblue/config.json",
        quantization=json.loads((pair / "genieblue/config.json").read_text())["quantization"]
        | {"source": {"name": SOURCE, "revision": None}},
    )
    publish_quantized_base(pair / "base", BASE)
    publish_folder(pair / "genieblue", REPO, base=BASE)
    card = ModelCard.load(REPO)
    assert (card.data.base_model, card.data.base_model_relation) == (SOURCE, "quantized")
    assert {"quantized", "w4a16", "w8a16"} <= set(card.data.tags) and "peft" not in card.data.tags
    base_card = ModelCard.load(BASE)
    assert base_card.data.base_model is None  # its source was a folder
    assert f'repo = "{BASE}"' in base_card.text


def test_without_the_source_on_the_hub_the_card_names_the_quantized_base(hub, pair):
    publish_quantized_base(pair / "base", BASE)
    publish_folder(pair / "genieblue", REPO, base=BASE)
    card = ModelCard.load(REPO)
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "quantized")
    local = render_model_card(card_info_from_folder(pair / "genieblue"))
    assert "base_model:" not in local and "base_model_relation" not in local


def test_the_card_has_precision_size_and_error_of_each_part(whole):
    card = render_model_card(card_info_from_folder(whole))
    rows = dict(re.findall(r"^\| `(\w+)` \| (w\d+a16) \| .+ \| .+ \| [\d.]+ \|$", card, flags=re.MULTILINE))
    assert rows == {
        "vision_tower": "w8a16", "multi_modal_projector": "w8a16", "replicated_blocks": "w4a16", "lora": "w8a16"
    }  # fmt: skip
    assert "Error of the multimodal view's logits" in card
    assert "LoRA in 8 bits, dequantized in memory" in card
    assert "equal those of the quantized base bit for bit, not those of the original" in card
    assert "`vision_tower.embeddings.patch_embedding`: 16 bits: a convolution" in card
    assert "PeftModel" not in card


def test_the_licence_of_a_local_base_goes_into_both_cards(tmp_path):
    source = large_pair().parent
    pair = Path(shutil.copytree(source, tmp_path / "source"))
    (pair / "base-llm/README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Base\n")
    quantize_genieblue(pair / "genieblue", tmp_path / "reader", base_output=tmp_path / "base")
    assert ModelCard.load(tmp_path / "base/README.md").data.license == "mit"
    write_quantized_base_card(tmp_path / "base")  # anew, when the source may be gone
    assert ModelCard.load(tmp_path / "base/README.md").data.license == "mit"
    assert card_info_from_folder(tmp_path / "reader").base_license.id == "mit"


@pytest.mark.parametrize("repo", [BASE, REPO])
def test_code_of_both_cards_runs_as_printed(hub, pair, tmp_path, repo):
    publish_quantized_base(pair / "base", BASE)
    publish_folder(pair / "genieblue", REPO, base=BASE)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    card = Path(hf_hub_download(repo, "README.md")).read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 1
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + blocks[0]],
        cwd=tmp_path,
        env=hub.env(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_a_base_is_loaded_from_the_hub_as_from_its_folder(hub, pair):
    publish_quantized_base(pair / "base", BASE)
    ids = prompt()
    assert torch.equal(load_base(BASE)(ids).logits, load_base(pair / "base")(ids).logits)
