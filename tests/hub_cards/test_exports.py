"""Exports of the language side on the Hub: what is published, what the cards say, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from clean_process import run_clean
from command_line import error_of, run
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_genieblue import save_tiny_pair
from tiny_quantized import contents, own_copy

from conversion.lora_form import export_lora
from conversion.merge import export_merged
from hub_cards.exports import read_export
from modeling_genieblue import GenieBlueForConditionalGeneration

REPO, BASE = "you/adapter", "you/base"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """`base`, `genieblue` on it, and its exports `lora` and `merged`: only to be read."""
    folder = tmp_path_factory.mktemp("exports")
    source = save_tiny_pair(folder, "qwen2")
    (folder / "base/README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    export_lora(source, folder / "lora", rank=8)
    export_merged(source, folder / "merged")
    return folder


@pytest.fixture
def own(exports, tmp_path) -> Path:
    """The same, to be damaged."""
    return own_copy(exports, tmp_path)


def logits_of_view(folder: Path) -> torch.Tensor:
    view = GenieBlueForConditionalGeneration.from_pretrained(folder).multimodal_language_model
    with torch.no_grad():
        return view(torch.arange(20, 29)[None], use_cache=False).logits


def test_a_lora_is_one_commit_and_loads_by_its_name_alone(hub, exports, tmp_path):
    base_commit = hub.commit_folder(BASE, exports / "base")
    before = contents(exports / "lora")
    run("push", exports / "lora", REPO, "--base", BASE)
    assert contents(exports / "lora") == before
    assert len(hub.commits(REPO)) == 1
    files = hub.files(REPO)
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "genieblue_export.json", "spectrum.png",
        ".gitattributes",
    }  # fmt: skip
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base_commit)
    answered = run_clean(
        f"""
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({REPO!r}, revision=None)
        with torch.no_grad():
            answer(model(torch.arange(20, 29)[None], use_cache=False).logits.tolist())
        """,
        tmp_path,
        hub.env(),
    )
    error = torch.tensor(answered) - (exact := logits_of_view(exports / "genieblue"))
    assert error.norm() < 0.5 * exact.norm()


def test_the_card_of_a_lora_says_what_it_is_of_and_what_it_cannot_do(hub, exports):
    commit = hub.commit_folder(BASE, exports / "base")
    run("push", exports / "lora", REPO, "--base", f"{BASE}@{commit}")
    card = ModelCard.load(REPO)
    assert (card.data.base_model, card.data.license, card.data.library_name) == (BASE, "mit", "peft")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card.text and commit in card.text
    assert "LoRA cannot carry" in card.text and "q_proj.bias" in card.text
    assert "| 3 | `mlp.up_proj` | 64×32 | 8 | 32 |" in card.text
    assert str(exports) not in card.text + hub.files(REPO)["genieblue_export.json"].decode()


def test_a_merged_model_needs_no_base_and_loads_by_its_name(hub, exports, tmp_path):
    run("push", exports / "merged", REPO)
    assert len(hub.commits(REPO)) == 1
    card = ModelCard.load(REPO)
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert "Its text answers are not the base's" in card.text
    answered = run_clean(
        f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({REPO!r})
        AutoTokenizer.from_pretrained({REPO!r})
        with torch.no_grad():
            answer(model(torch.arange(20, 29)[None], use_cache=False).logits.tolist())
        """,
        tmp_path,
        hub.env(),
    )
    exact = logits_of_view(exports / "genieblue")
    assert (torch.tensor(answered) - exact).norm() < 1e-3 * exact.norm()


def test_a_lora_on_a_local_base_is_refused_with_the_way_to_go(hub, exports):
    assert "--base you/base" in error_of("push", exports / "lora", REPO)


def test_another_base_on_the_hub_is_refused(hub, own, exports):
    weights = own / "base/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    hub.commit_folder(BASE, own / "base")
    assert "is not the base that this model was made from" in error_of("push", exports / "lora", REPO, "--base", BASE)


@pytest.mark.parametrize(("kind", "file"), [("lora", "adapter_model.safetensors"), ("merged", "model.safetensors")])
def test_damaged_weights_are_refused(hub, own, kind, file):
    hub.commit_folder(BASE, own / "base")
    path = own / kind / file
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    assert "NaN or infinity" in error_of("push", own / kind, REPO, "--base", BASE)
    path.write_bytes(path.read_bytes()[:-8])
    assert "damaged" in error_of("push", own / kind, REPO, "--base", BASE)


def test_a_merged_model_without_its_tokenizer_is_refused(hub, own):
    (own / "merged/tokenizer.json").unlink()
    assert "The tokenizer is missing" in error_of("push", own / "merged", REPO)


def test_an_edited_card_is_sent_as_it_is(hub, own):
    (own / "merged/README.md").write_text("# Mine\n")
    run("push", own / "merged", REPO)
    assert hub.files(REPO)["README.md"] == b"# Mine\n"


def test_an_adapter_is_not_put_beside_a_model(hub, exports):
    hub.commit(REPO, {"config.json": b"{}"})
    hub.commit_folder(BASE, exports / "base")
    assert "already contains another model" in error_of("push", exports / "lora", REPO, "--base", BASE)


@pytest.mark.parametrize(
    "content", ['{"kind": "other", "source": {}, "base": {}, "measurements": []}', "[]", "{}", "{"]
)
def test_damaged_facts_are_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "genieblue_export.json").write_text(content)
    with pytest.raises(OSError, match="genieblue_export.json"):
        read_export(tmp_path)
