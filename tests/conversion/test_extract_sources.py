"""What `extract` reads: at which commit and in which precision, what it refuses, and what a budget pays for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlms import save_tiny_vlm_pair, tiny_vlm_pair
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import conversion.extract as extract_module
from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from modeling_genieblue import GenieBlueForConditionalGeneration

ROOT = Path(__file__).parents[2]
TOWER = "vision_tower.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_vlm_pair(tmp_path_factory.mktemp("pair"))


def with_card(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    return folder


def test_all_of_a_vlm_is_of_one_commit_which_the_card_names_with_the_vlms_licence(hub, tmp_path, monkeypatch):
    vlm, base = save_tiny_vlm_pair(tmp_path)
    hub.commit_folder("maker/base", with_card(base, "license: apache-2.0"))
    commit = hub.commit_folder("maker/vlm", with_card(vlm, "license: cc-by-nc-4.0"))
    expected = load_file(vlm / "model.safetensors")[TOWER]

    def changed_meanwhile(*args, **kwargs):
        save_file(
            {name: each + 1 for name, each in load_file(vlm / "model.safetensors").items()},
            vlm / "model.safetensors",
            {"format": "pt"},
        )
        hub.commit_folder("maker/vlm", vlm)
        return original(*args, **kwargs)

    original = extract_module.load_base_model
    monkeypatch.setattr(extract_module, "load_base_model", changed_meanwhile)
    mine = extract_genieblue("maker/vlm", "maker/base", tmp_path / "mine").output
    assert torch.equal(load_file(mine / "model.safetensors")[f"vlm.model.{TOWER}"], expected)
    assert json.loads((mine / "config.json").read_text())["vlm_revision"] == commit
    assert json.loads((mine / "extraction.json").read_text())["source"] == {"name": "maker/vlm", "revision": commit}
    card = (mine / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card
    assert f"the licence of [`maker/vlm`](https://huggingface.co/maker/vlm) at commit `{commit}` applies" in card
    assert "applies to them: cc-by-nc-4.0." in card
    assert "applies too: apache-2.0." in card


def test_the_processor_of_a_model_from_a_loaded_vlm_is_of_the_vlms_commit(hub, tmp_path):
    vlm, base = save_tiny_vlm_pair(tmp_path)
    hub.commit_folder("maker/vlm", vlm)
    loaded = AutoModelForImageTextToText.from_pretrained("maker/vlm")
    template = (vlm / "chat_template.jinja").read_text()
    (vlm / "chat_template.jinja").write_text("another")
    hub.commit_folder("maker/vlm", vlm)
    model = GenieBlueForConditionalGeneration.from_vlm(loaded, AutoModelForCausalLM.from_pretrained(base))
    processor = model.make_processor(AutoTokenizer.from_pretrained(base))
    assert processor.vlm_processor.chat_template == template


@pytest.mark.parametrize("placement", ["auto", "skip"])
def test_a_budget_pays_for_all_that_is_added(placement, tmp_path):
    vlm, base = tiny_vlm_pair("llava")
    with torch.no_grad():  # training has changed every row
        for each in (vlm.get_input_embeddings(), vlm.get_output_embeddings()):
            each.weight.add_(0.01)
    pair = save_pair(tmp_path, vlm, base)
    result = extract_genieblue(*pair, tmp_path / "mine", Choice(placement, max_bytes=120_000))
    adapter = load_file(result.output / "language_adapter" / "adapter_model.safetensors")
    own = {
        name: each
        for name, each in load_file(result.output / "model.safetensors").items()
        if name.startswith("own_language.")
    }
    whole = sum(each.numel() * each.element_size() for each in own.values())
    assert result.own_bytes == whole > 50_000
    added = whole + sum(each.numel() * each.element_size() for each in adapter.values())
    assert 0.8 * 120_000 < added <= 120_000


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"copies": 0, "max_bytes": 1000}, r"budget of 1,000 bytes, \d,\d\d\d are needed .* nothing is left"),
        ({"copies": 0, "max_bytes": 6000}, r"\d,\d\d\d are needed .*\. A budget of .* does not pay for rank 1"),
        ({"copies": 9}, "^`copies` is 9, but the base has 4 blocks"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused_with_the_numbers_before_the_changes_are_computed(
    choice, message, pair, tmp_path, monkeypatch
):
    monkeypatch.setattr(extract_module, "factor_change", None)
    with pytest.raises(ValueError, match=message):
        extract_genieblue(*pair, tmp_path / "mine", Choice(**choice))
    assert not list(tmp_path.iterdir())


def save_pair(folder, vlm, base):
    """Saves the weights of a pair in place of those of `save_tiny_vlm_pair`."""
    places = save_tiny_vlm_pair(folder)
    image_token = json.loads((places[0] / "config.json").read_text())["image_token_index"]
    vlm.config.image_token_id = image_token
    vlm.save_pretrained(places[0])
    base.save_pretrained(places[1])
    return places


def test_a_vlm_that_is_rounded_to_the_bases_precision_is_named_and_its_card_says_so(tmp_path, caplog):
    vlm, base = tiny_vlm_pair("llava", dtype=torch.float16)
    places = save_pair(tmp_path, vlm, base.to(torch.bfloat16))
    result = extract_genieblue(*places, tmp_path / "mine", Choice(copies=4))
    assert f"{places[0]} is stored in float16 and read in bfloat16, the precision of the base" in caplog.text
    assert "the VLM's weights rounded from float16 to bfloat16" in (result.output / "README.md").read_text()


def test_a_vlm_in_the_bases_precision_is_not_said_to_be_rounded(pair, tmp_path, caplog):
    assert "rounded" not in extract_genieblue(*pair, tmp_path / "mine").measurements[0].how
    assert "is stored in" not in caplog.text


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[TOWER] = change(tensors[TOWER])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([1]), float("nan")), "contains NaN or infinity"),
        (lambda weight: (weight * 100).to(torch.int8), "holds I8, expected floating-point numbers"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "holds F8_E4M3, expected floating-point numbers"),
    ],
    ids=["nan", "integers", "fp8 without a config"],
)
def test_weights_of_the_vision_tower_that_are_no_numbers_are_refused(change, message, pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    change_weights(vlm, change)
    with pytest.raises(ValueError, match=f"weights of the VLM .*{message}"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


@pytest.mark.parametrize("which", [0, 1], ids=["vlm", "base"])
def test_pickled_weights_are_not_read(which, pair, tmp_path):
    copied = [shutil.copytree(each, tmp_path / each.name) for each in pair]
    torch.save(load_file(copied[which] / "model.safetensors"), copied[which] / "pytorch_model.bin")
    (copied[which] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        extract_genieblue(*copied, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_pickled_weights_on_the_hub_are_not_read(hub, tmp_path):
    vlm, base = save_tiny_vlm_pair(tmp_path)
    torch.save(load_file(vlm / "model.safetensors"), vlm / "pytorch_model.bin")
    (vlm / "model.safetensors").unlink()
    hub.commit_folder("maker/vlm", vlm)
    with pytest.raises(OSError, match="The VLM maker/vlm could not be loaded"):
        extract_genieblue("maker/vlm", base, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_calibration_of_a_vlm_that_adds_to_its_blocks_is_refused_before_any_weights_are_read(pair, tmp_path):
    tiny_vlm_pair("qwen3_vl")[0].config.save_pretrained(tmp_path / "vlm")
    with pytest.raises(ValueError, match="'qwen3_vl' adds features of images between its blocks.*--calibration"):
        extract_genieblue(tmp_path / "vlm", pair[1], tmp_path / "mine", calibration=[])


KILLED = """
import os, signal, sys
import conversion.extract as module
from modeling_genieblue.staging_genieblue import NewFolder

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def put_and_die(self, *args):
    put(self, *args)
    die()

put = NewFolder.put_in_place
if sys.argv[4] == "in place":
    NewFolder.put_in_place = put_and_die
else:
    module.plan_extraction = die
module.extract_genieblue(*sys.argv[1:4], module.Choice(copies=2, rank=4))
"""


@pytest.mark.parametrize("when", ["computed", "in place"])
def test_a_killed_run_leaves_a_whole_folder_or_none(when, pair, tmp_path):
    mine = tmp_path / "mine"
    command = [sys.executable, "-c", KILLED, *map(str, (*pair, mine)), when]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    if when == "in place":
        assert "![Size of copies and LoRA" in (mine / "README.md").read_text()
        assert (mine / "extraction.png").stat().st_size > 1000
        GenieBlueForConditionalGeneration.from_pretrained(mine)
    else:
        assert not mine.exists()
        extract_genieblue(*pair, mine)  # what the dead process left behind is removed
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_output_that_exists_is_refused(pair, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        extract_genieblue(*pair, tmp_path / "there")


def test_a_missing_shard_is_named_before_anything_is_read(pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    (vlm / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (vlm / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, which is not there"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("which", "part"), [(0, None), (1, None), (0, "text_config")])
def test_a_quantized_source_is_refused(pair, tmp_path, which, part):
    copied = [shutil.copytree(each, tmp_path / each.name) for each in pair]
    config = json.loads((copied[which] / "config.json").read_text())
    (config if part is None else config[part])["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied[which] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are quantized"):
        extract_genieblue(*copied, tmp_path / "mine")


@pytest.mark.parametrize("which", ["vlm", "base"])
def test_an_adapter_beside_the_weights_is_refused_with_the_way_to_go(pair, tmp_path, which):
    copied = [shutil.copytree(each, tmp_path / each.name) for each in pair]
    kind = AutoModelForImageTextToText if which == "vlm" else AutoModelForCausalLM
    adapted = get_peft_model(kind.from_pretrained(tmp_path / which), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / which)
    with pytest.raises(ValueError, match="has an adapter of PEFT: merge it"):
        extract_genieblue(*copied, tmp_path / "mine")


@pytest.mark.parametrize("prompt", ["{{ messages[0]['content'] + '!' }}", "{{ messages[0]['content'] | length }}"])
def test_a_template_that_writes_no_images_is_not_measured_with(pair, tmp_path, prompt):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    (vlm / "chat_template.jinja").write_text(prompt)
    rows = extract_genieblue(vlm, pair[1], tmp_path / "mine", Choice(copies=4)).measurements
    assert "a fixed prompt behind one image" in rows[0].how


def test_calibration_without_a_template_for_images_is_refused(pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    (vlm / "chat_template.jinja").write_text("{{ messages[0]['content'] + '!' }}")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    chats = [(chat, [Image.new("RGB", (28, 28))])]
    with pytest.raises(ValueError, match="no chat template that formats chats with images .*--calibration"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine", calibration=chats)


def test_a_vlm_with_another_vocabulary_is_refused_with_the_number(pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    tokenizer = json.loads((vlm / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary.values())
    moved = {token: index if index < 60 else last + 60 - index for token, index in vocabulary.items()}
    tokenizer["model"]["vocab"] = moved
    (vlm / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"of the base's 120 tokens are missing or have another id"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine")


def test_a_language_model_in_the_place_of_the_vlm_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="is of type 'llama': expected one of gemma3"):
        extract_genieblue(pair[1], pair[1], tmp_path / "mine")


CODE = "from pathlib import Path\nPath({place!r}).touch()\nclass Theirs:\n    pass\n"


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        (
            "config.json",
            "AutoConfig",
            r"'internvl_chat': expected one of .*transformers itself loads \(often named -hf\)",
        ),
        ("processor_config.json", "AutoProcessor", "never runs: .*transformers itself loads"),
    ],
)
def test_code_of_a_vlms_repository_is_neither_run_nor_asked_about(file, kind, message, pair, tmp_path, monkeypatch):
    vlm, ran = shutil.copytree(pair[0], tmp_path / "vlm"), tmp_path / "ran"
    settings = json.loads((vlm / file).read_text())
    if file == "config.json":
        settings["model_type"] = "internvl_chat"
    else:
        settings["processor_class"] = "Theirs"
    (vlm / file).write_text(json.dumps({**settings, "auto_map": {kind: "code.Theirs"}}))
    (vlm / "code.py").write_text(CODE.format(place=str(ran)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("signal.alarm", lambda _seconds: 0)
    try:
        with pytest.raises(ValueError, match=message):
            extract_genieblue(vlm, pair[1], tmp_path / "mine")
    finally:
        assert not ran.exists()
    assert not (tmp_path / "mine").exists()


def test_a_vlm_of_another_base_is_refused_and_leaves_nothing(pair, tmp_path):
    other = save_tiny_vlm_pair(tmp_path, change=2.0)[0]
    with pytest.raises(ValueError, match="of their size"):
        extract_genieblue(other, pair[1], tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "vlm"]
