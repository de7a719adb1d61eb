"""What a model card says, what it leaves out, and that it never replaces somebody's own."""

import ast
import re

import pytest
from handmade_folder import BASE, REVISION, write_handmade_folder, write_json
from huggingface_hub import ModelCard, ModelCardData

from hub_cards import model_card
from hub_cards.model_card import (
    License,
    Measurement,
    ModelCardInfo,
    card_info_from_folder,
    is_as_generated,
    render_model_card,
    write_model_card,
)
from hub_cards.model_folder import PartSize

LEAST = ModelCardInfo(repo_name="you/reader", base_model=BASE, base_is_on_hub=True)
FULL = ModelCardInfo(
    repo_name="you/reader",
    base_model=BASE,
    base_is_on_hub=True,
    base_revision=REVISION,
    base_license=License("other", "base-research", "https://example.org/license"),
    num_blocks=36,
    vision_model="maker/siglip",
    parts={"vision_tower": PartSize(428_225_600, 856_451_200), "lora": PartSize(900, 1_800)},
    placement="skip",
    replicated_layers=[3, 7],
    lora_rank=8,
    lora_alpha=16,
    tile_size=384,
    max_tiles=16,
    image_seq_length=196,
    recipe={"stage 1": {"learning rate": 1e-3, "trained": "projector"}, "stage 2": {"steps": 100}},
    measurements=[Measurement("exact match", "91.4 %", "500 held-out numbers")],
    languages=["en", "zh"],
)


@pytest.fixture(autouse=True)
def hub_cards_without_network(monkeypatch):
    def no_network(base, revision):
        raise OSError("no network in this test")

    monkeypatch.setattr(model_card, "_ask_hub", no_network)


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_front_matter_tells_the_hub_what_the_model_is():
    data = ModelCard(render_model_card(FULL)).data.to_dict()
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert data["license"] == "other"
    assert data["license_name"] == "base-research"
    assert data["license_link"] == "https://example.org/license"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["language"] == ["en", "zh"]
    assert {"genieblue", "multimodal", "siglip", "peft"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))


def test_body_states_every_known_fact():
    card = render_model_card(FULL)
    for fact in (
        REVISION,
        "| `vision_tower` | 428.23 M | 856.45 MB |",
        "| total | 428.23 M | 856.45 MB |",
        "3, 7 of 36",
        "every fourth block",
        "rank 8, alpha 16",
        "up to 16 tiles of 384×384",
        "196 image tokens",
        "maker/siglip",
        "| learning rate | 0.001 |",
        "| exact match | 91.4 % | 500 held-out numbers |",
        "[base-research](https://example.org/license)",
    ):
        assert fact in card, fact


def test_what_is_unknown_leaves_no_trace():
    card = render_model_card(LEAST)
    data = ModelCard(card).data.to_dict()
    assert not {"license", "license_name", "language"} & set(data)
    for word in (
        "None",
        "More Information",
        "TODO",
        "## Training",
        "| metric",
        "LoRA:",
        "rank",
        "at commit",
        "| part",
    ):
        assert word not in card, word
    assert "were not measured" in card


@pytest.mark.parametrize("info", [LEAST, FULL], ids=["least", "full"])
def test_markdown_has_no_gaps_or_broken_tables(info):
    body = render_model_card(info).split("\n---\n", 1)[1]
    assert "\n\n\n" not in body
    for table in re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("vlm_license", [None, License("cc-by-nc-4.0")])
def test_what_a_vlm_gave_is_under_its_licence(vlm_license):
    of_vlm = {"vlm_type": "llava", "vlm": "maker/vlm", "vlm_revision": "1" * 40, "vlm_license": vlm_license}
    card = render_model_card(ModelCardInfo("you/reader", BASE, True, base_license=License("mit"), **of_vlm))
    assert f"the licence of [`maker/vlm`](https://huggingface.co/maker/vlm) at commit `{'1' * 40}` applies" in card
    assert ("applies to them: cc-by-nc-4.0." in card) == (vlm_license is not None)
    assert "applies too: mit." in card
    assert ("\nlicense: cc-by-nc-4.0" in card) == (vlm_license is not None)
    assert "\nlicense: mit" not in card


BLOCKS_OF_A_VLM = {  # copied blocks of 4: what the card says, and what it does not
    (): (
        ["with LoRA on all blocks.", "LoRA on the linear layers of all blocks: rank 8 to 13, by layer"],
        ["copied blocks", "other blocks", "in place of", "Replicated blocks"],
    ),
    (1, 3): (
        ["in place of some blocks and LoRA on all others.", "layers of all other blocks: rank", "The copied blocks, "],
        [],
    ),
    (0, 1, 2, 3): (
        ["with the VLM's own blocks in place of all.", "Replicated blocks: 0, 1, 2, 3 of 4", "The copied blocks, "],
        ["LoRA", "\n- lora\n"],
    ),
}


@pytest.mark.parametrize("copied", BLOCKS_OF_A_VLM)
def test_the_card_of_a_vlm_tells_which_blocks_are_copied_and_which_have_lora(copied, tmp_path):
    ranks = {} if len(copied) == 4 else {"model.layers.0.mlp.up_proj": 13}
    settings = {"num_hidden_layers": 4}
    folder = write_handmade_folder(
        tmp_path / "reader", replicated_layers=list(copied), rank_pattern=ranks, text_config=settings,
        vision_config=None, vlm_config={"model_type": "llava"},
    )  # fmt: skip
    info = card_info_from_folder(folder)
    card = " ".join(render_model_card(info).split(" "))
    said, unsaid = BLOCKS_OF_A_VLM[copied]
    assert [each for each in said if each not in card] == []
    assert [each for each in unsaid if each in card] == []


@pytest.mark.parametrize(("kind", "is_siglip"), [("siglip_vision_model", True), ("clip_vision_model", False)])
def test_a_vlm_is_filed_under_siglip_only_if_that_is_its_vision_model(kind, is_siglip, tmp_path):
    vlm = {"model_type": "llava", "vision_config": {"model_type": kind}}
    folder = write_handmade_folder(tmp_path / "reader", vision_config=None, vlm_config=vlm)
    tags = ModelCard(render_model_card(card_info_from_folder(folder))).data.to_dict()["tags"]
    assert ("siglip" in tags) == is_siglip


@pytest.mark.parametrize("name", ["maker/vlm", "/home/me/vlm", None])
def test_the_hub_is_told_of_the_vlm_too_if_it_has_that(name, tmp_path):
    vlm = {"model_type": "llava", "_name_or_path": name}
    folder = write_handmade_folder(tmp_path / "reader", vision_config=None, vlm_config=vlm)
    data = ModelCard(render_model_card(card_info_from_folder(folder))).data.to_dict()
    assert data["base_model"] == ([BASE, name] if name == "maker/vlm" else BASE)
    assert data["base_model_relation"] == "adapter"


def test_a_cell_cannot_break_out_of_its_table():
    info = ModelCardInfo(
        "you/reader",
        BASE,
        True,
        measurements=[Measurement("a|b", "1\n2", "on ```x``` | y")],
        base_license=License("mit"),
    )
    assert "| a\\|b | 1 2 | on ```x``` \\| y |" in render_model_card(info)


@pytest.mark.parametrize("info", [LEAST, FULL], ids=["least", "full"])
def test_load_code_is_short_valid_python_about_this_repo(info):
    ask, peft = code_blocks(render_model_card(info))
    for code in (ask, peft):
        ast.parse(code)
        assert '"you/reader"' in code
        assert 3 <= len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "trust_remote_code=True" in ask
    assert f'"{BASE}"' in peft
    assert 'subfolder="language_adapter"' in peft
    assert (f'revision="{REVISION}"' in peft) == (info is FULL)


def test_a_base_with_remote_code_is_loaded_with_leave_for_it(tmp_path):
    text_config = {"model_type": "BlueLM", "auto_map": {"AutoModelForCausalLM": "modeling_bluelm.BlueLM"}}
    for runs_code in (True, False):  # transformers has some of these types itself, and needs no leave then
        folder = write_handmade_folder(
            tmp_path / f"reader-{runs_code}", text_config=text_config, base_model_runs_remote_code=runs_code
        )
        _, peft = code_blocks(render_model_card(card_info_from_folder(folder)))
        ast.parse(peft)
        assert ("trust_remote_code=True" in peft) == runs_code


def test_facts_are_found_in_a_saved_folder(tmp_path):
    folder = write_handmade_folder(tmp_path / "reader")
    write_json(folder / "training_recipe.json", {"stage 1": {"steps": 5}})
    write_json(folder / "measurements.json", [{"name": "exact match", "value": 0.5, "how": "ten scans"}])
    info = card_info_from_folder(folder, "you/reader")
    assert info == ModelCardInfo(
        repo_name="you/reader",
        base_model=BASE,
        base_is_on_hub=True,
        base_revision=REVISION,
        num_blocks=8,
        vision_model="maker/siglip",
        parts={
            "multi_modal_projector": PartSize(12, 48),
            "vision_tower": PartSize(30, 120),
            "lora": PartSize(8, 32),
            "replicated_blocks": PartSize(20, 80),
        },
        placement="skip",
        replicated_layers=[3, 7],
        lora_rank=8,
        lora_alpha=16,
        tile_size=384,
        max_tiles=16,
        image_seq_length=196,
        recipe={"stage 1": {"steps": 5}},
        measurements=[Measurement("exact match", "0.5", "ten scans")],
    )


def test_licence_of_a_local_base_comes_from_its_readme(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    folder = write_handmade_folder(tmp_path / "reader", base_model_name_or_path="../base", base_model_revision=None)
    info = card_info_from_folder(folder)
    assert info.base_license == License("apache-2.0")
    assert info.languages == ["en"]
    card = render_model_card(info)
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data  # the Hub takes only its own ids
    # The printed code runs from the folder in which both lie.
    ask, peft = code_blocks(card)
    assert 'repo = "reader"' in ask
    assert '"base"' in peft


def test_a_local_base_with_a_broken_readme_has_an_unknown_licence(tmp_path, caplog):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    folder = write_handmade_folder(tmp_path / "reader", base_model_name_or_path="../base", base_model_revision=None)
    assert card_info_from_folder(folder).base_license is None
    assert "The base's licence is unknown" in caplog.text


def test_licence_of_a_hub_base_comes_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def answer(base, revision):
        asked.append((base, revision))
        return ModelCardData(license="other", license_name="research", license_link="LICENSE", language="en").to_dict()

    monkeypatch.setattr(model_card, "_ask_hub", answer)
    info = card_info_from_folder(write_handmade_folder(tmp_path / "reader"))
    assert asked == [(BASE, REVISION)]
    # A link to the base's own file would lead nowhere from our repo.
    link = f"https://huggingface.co/{BASE}/blob/{REVISION}/LICENSE"
    assert info.base_license == License("other", "research", link)


def test_an_unreachable_hub_leaves_the_licence_unknown_and_says_so(tmp_path, caplog):
    info = card_info_from_folder(write_handmade_folder(tmp_path / "reader"))
    assert info.base_license is None
    assert "no network in this test" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_recipe.json", ["stage 1"]),
        ("training_recipe.json", {"stage 1": 5}),
        ("measurements.json", {"name": "x"}),
        ("measurements.json", [{"name": "x"}]),
    ],
)
def test_a_fact_file_of_another_form_is_named(tmp_path, name, content):
    folder = write_handmade_folder(tmp_path / "reader")
    write_json(folder / name, content)
    with pytest.raises(ValueError, match=f"{name} does not have the form"):
        card_info_from_folder(folder)


def test_a_model_whose_base_is_not_recorded_has_a_card_that_says_so(tmp_path):
    folder = write_handmade_folder(tmp_path / "reader", base_model_name_or_path=None, base_model_revision=None)
    card = render_model_card(card_info_from_folder(folder))
    assert "does not record its base" in card
    assert "None" not in card
    assert len(code_blocks(card)) == 1  # there is no base to put the adapter on


def test_a_card_is_written_once_and_never_over_another(tmp_path):
    assert write_model_card(tmp_path, LEAST) is True
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == render_model_card(LEAST)
    (tmp_path / "README.md").write_text("mine")
    assert write_model_card(tmp_path, FULL) is False
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_that_cannot_be_written_whole_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "render_model_card", lambda info: "half a card \udfff")  # fails in the encoder
    with pytest.raises(ValueError):
        write_model_card(tmp_path, LEAST)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("edit", [lambda card: card.replace("reader", "writer"), lambda card: card + "More.\n"])
def test_an_edit_of_a_generated_card_is_noticed(edit):
    card = render_model_card(FULL)
    assert is_as_generated(card)
    assert is_as_generated(card.replace("\n", "\r\n"))
    assert not is_as_generated(edit(card))
    assert not is_as_generated("# Mine\n")
