"""Publishing to a Hub over HTTP: one commit, the right files, and respect for what somebody else put there."""

from pathlib import Path

import pytest
from handmade_folder import BASE, REVISION, write_handmade_folder
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hub_cards import one_commit
from hub_cards.model_card import card_info_from_folder, is_as_generated, render_model_card, write_model_card
from hub_cards.publish import files_to_publish, publish_folder

REPO = "you/reader"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_handmade_folder(tmp_path / "saved")


def published_card(hub) -> str:
    return hub.files(REPO)["README.md"].decode()


def test_a_push_is_one_commit_with_exactly_our_files(hub, folder):
    (folder / "optimizer.pt").write_text("private")
    commit = publish_folder(folder, REPO, commit_message="First")
    assert [made.sha for made in hub.commits(REPO)] == [commit.oid]
    files = hub.files(REPO)
    assert set(files) == {*files_to_publish(folder), ".gitattributes"}
    for name in files_to_publish(folder):
        if name != "README.md":
            assert files[name] == (folder / name).read_bytes()


def test_the_card_names_the_repo_it_lies_in(hub, folder):
    write_model_card(folder, card_info_from_folder(folder))  # as a save does, which knows no repo
    publish_folder(folder, REPO)
    assert f'repo = "{REPO}"' in published_card(hub)
    assert ModelCard.load(REPO).data.base_model == BASE
    assert 'repo = "saved"' in (folder / "README.md").read_text()  # the folder's own is never overwritten


def test_a_missing_card_is_written_into_the_folder_too(hub, folder):
    publish_folder(folder, REPO)
    assert (folder / "README.md").read_text(encoding="utf-8") == published_card(hub)


def test_licence_of_the_base_on_the_hub_is_in_the_card(hub, folder):
    sha = hub.commit("maker/base-two", {"README.md": b"---\nlicense: mit\n---\n# Base\n"})
    folder = write_handmade_folder(
        folder.parent / "two", base_model_name_or_path="maker/base-two", base_model_revision=sha
    )
    publish_folder(folder, REPO)
    assert ModelCard.load(REPO).data.license == "mit"


def test_a_card_of_the_folders_owner_is_sent_as_it_is(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    publish_folder(folder, REPO)
    assert published_card(hub) == "---\nlicense: mit\n---\n# Mine\n"


def test_a_card_edited_on_the_hub_survives_the_next_push(hub, folder):
    publish_folder(folder, REPO)
    edited = published_card(hub) + "\nTested on receipts.\n"
    hub.commit(REPO, {"README.md": edited.encode()})
    publish_folder(folder, REPO, commit_message="Again")
    assert published_card(hub) == edited


def test_a_generated_card_on_the_hub_is_brought_up_to_date(hub, folder):
    publish_folder(folder, REPO)
    (folder / "measurements.json").write_text('[{"name": "exact match", "value": "91 %", "how": "scans"}]')
    publish_folder(folder, REPO)
    assert "| exact match | 91 % | scans |" in published_card(hub)
    assert is_as_generated(published_card(hub))


def test_results_in_the_hubs_form_are_published(hub, folder):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results/held-out.yaml").write_text("- value: 1\n")
    (folder / ".eval_results/notes.txt").write_text("mine")
    publish_folder(folder, REPO)
    assert [name for name in hub.files(REPO) if name.startswith(".eval")] == [".eval_results/held-out.yaml"]


def test_stale_files_of_ours_go_and_other_files_stay(hub, folder):
    stale = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
        "language_adapter/old.safetensors": b"old",
        "old_genieblue.py": b"",
        "quanto_qmap.json": b"{}",
        "measurements.json": b"[]",
        ".eval_results/old.yaml": b"[]",
        "base/quantized_model.safetensors": b"old",
    }
    kept = {
        "app.py": b"",
        "extra.safetensors": b"mine",
        "examples/model.safetensors": b"mine",
        "examples/x_genieblue.py": b"",
    }
    hub.commit(REPO, stale | kept)
    publish_folder(folder, REPO)
    files = hub.files(REPO)
    assert not set(stale) & set(files)
    assert {name: files[name] for name in kept} == kept
    assert len(hub.commits(REPO)) == 2


def test_a_private_repo_is_created_private(hub, folder):
    publish_folder(folder, REPO, private=True)
    with pytest.raises(HfHubHTTPError):
        ModelCard.load(REPO, token=hub.stranger_token)


def test_a_push_to_a_branch_leaves_main_alone(hub, folder):
    publish_folder(folder, REPO)
    (folder / "measurements.json").write_text('[{"name": "exact match", "value": "91 %", "how": "scans"}]')
    publish_folder(folder, REPO, revision="trial")
    assert "measurements.json" in hub.files(REPO, "trial")
    assert "measurements.json" not in hub.files(REPO)


def test_a_push_that_fails_leaves_the_old_commit_whole(hub, folder):
    publish_folder(folder, REPO)
    before = hub.files(REPO)
    (folder / "tokenizer.json").write_text('{"changed": true}')
    hub.fail_next("POST", "/commit/", status=403)
    with pytest.raises(HfHubHTTPError):
        publish_folder(folder, REPO)
    assert hub.files(REPO) == before


def test_a_commit_that_came_in_between_makes_a_push_fail(hub, folder, monkeypatch):
    publish_folder(folder, REPO)
    render = one_commit._card_to_send

    def edited_meanwhile(*arguments):
        card = render(*arguments)
        hub.commit(REPO, {"README.md": b"edited by hand"})
        return card

    monkeypatch.setattr(one_commit, "_card_to_send", edited_meanwhile)
    with pytest.raises(HfHubHTTPError, match="412"):
        publish_folder(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"edited by hand" and len(hub.commits(REPO)) == 2


def test_a_repo_of_somebody_else_is_left_alone(hub, folder):
    publish_folder(folder, REPO)
    before = hub.files(REPO)
    with pytest.raises(HfHubHTTPError):
        publish_folder(folder, REPO, token=hub.stranger_token)
    assert hub.files(REPO) == before


def test_card_of_a_push_equals_a_rendering_of_the_folder(hub, folder):
    publish_folder(folder, REPO)
    assert published_card(hub) == render_model_card(card_info_from_folder(folder, REPO))
    assert REVISION in published_card(hub)
