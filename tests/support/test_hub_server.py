"""The local Hub answers the real clients as the real one would, and nothing of a test gets past it."""

import json
import subprocess
import sys
import urllib.request

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationDelete, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import save_tiny_base, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

REPO = "you/tiny"
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\nbase_model: org/base\ntags: [tiny]\n---\n# Tiny\n"
PROMPT = torch.tensor([[17, 80, 33, 64, 25]])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nested").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "nested" / "other.safetensors").write_bytes(b"other weights")
    return tmp_path


@pytest.fixture
def pushed(hub, folder):
    """A Hub to which `folder` was uploaded."""
    huggingface_hub.create_repo(REPO)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Add model")
    return hub


def test_owner_is_logged_in(hub):
    assert huggingface_hub.whoami()["name"] == "you"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        huggingface_hub.whoami(token="hf_nobody")


def test_repo_is_created_once(hub):
    assert huggingface_hub.create_repo(REPO).repo_id == REPO
    assert huggingface_hub.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created"):
        huggingface_hub.create_repo(REPO)
    assert hub.commits(REPO) == []


def test_repo_of_somebody_else_cannot_be_created_or_written(pushed):
    with pytest.raises(HfHubHTTPError, match="403"):
        huggingface_hub.create_repo("stranger/tiny")
    with pytest.raises(HfHubHTTPError, match="write permission"):
        HfApi(token=pushed.stranger_token).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO)
    assert len(pushed.commits(REPO)) == 1


def test_folder_is_uploaded_as_one_commit(pushed, folder):
    (commit,) = pushed.commits(REPO)
    assert commit.title == "Add model"
    assert commit.author == "you"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert pushed.files(REPO) == {**files, ".gitattributes": pushed.files(REPO)[".gitattributes"]}


def test_only_weights_are_large_files(pushed):
    files = pushed.commits(REPO)[-1].files
    assert {path for path, file in files.items() if file.is_lfs} == {"model.safetensors", "nested/other.safetensors"}
    uploads = [path for method, path in pushed.requests if method == "PUT"]
    assert len(uploads) == 2


def test_content_that_is_already_there_is_not_sent_again(pushed, folder):
    pushed.requests.clear()
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder)
    assert not [path for method, path in pushed.requests if method == "PUT" or "/commit/" in path]
    assert len(pushed.commits(REPO)) == 1


def test_file_is_uploaded_and_old_revisions_stay(pushed):
    first = pushed.commits(REPO)[-1].sha
    second = huggingface_hub.upload_file(path_or_fileobj=b"newer", path_in_repo="model.safetensors", repo_id=REPO).oid
    assert [commit.sha for commit in pushed.commits(REPO)] == [first, second]
    for revision, content in {first: b"weights" * 1000, second: b"newer", "main": b"newer"}.items():
        path = hf_hub_download(REPO, "model.safetensors", revision=revision)
        assert open(path, "rb").read() == content
        assert pushed.files(REPO, revision)["model.safetensors"] == content


def test_cache_names_large_files_by_sha256(pushed):
    path = hf_hub_download(REPO, "model.safetensors")
    sha256 = pushed.commits(REPO)[-1].files["model.safetensors"].sha256
    assert path.startswith(str(pushed.home))
    assert (pushed.home / "hub" / "models--you--tiny" / "blobs" / sha256).is_file()


def test_tags_and_branches_stay_where_they_were_put(pushed):
    first = pushed.commits(REPO)[-1].sha
    huggingface_hub.create_tag(REPO, tag="v1")
    huggingface_hub.create_branch(REPO, branch="side/track")
    huggingface_hub.upload_file(path_or_fileobj=b"newer", path_in_repo="new.txt", repo_id=REPO)
    huggingface_hub.upload_file(path_or_fileobj=b"side", path_in_repo="s.txt", repo_id=REPO, revision="side/track")

    refs = huggingface_hub.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first}
    assert {branch.name for branch in refs.branches} == {"main", "side/track"}
    assert "new.txt" in huggingface_hub.list_repo_files(REPO)
    assert "new.txt" not in huggingface_hub.list_repo_files(REPO, revision="v1")
    assert open(hf_hub_download(REPO, "s.txt", revision="side/track"), "rb").read() == b"side"


def test_files_and_folders_are_deleted_in_one_commit(pushed):
    operations = [CommitOperationDelete("config.json"), CommitOperationDelete("nested/")]
    huggingface_hub.create_commit(REPO, operations=operations, commit_message="Tidy up")
    assert set(pushed.files(REPO)) == {".gitattributes", "README.md", "model.safetensors"}
    assert len(pushed.commits(REPO)) == 2


def test_commit_onto_an_outdated_parent_is_refused(pushed):
    parent = pushed.commits(REPO)[-1].sha
    huggingface_hub.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="412"):
        huggingface_hub.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=REPO, parent_commit=parent)
    assert pushed.files(REPO)["a"] == b"1"


def test_commits_are_listed_newest_first(pushed):
    huggingface_hub.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO, commit_message="Add a")
    titles = [commit.title for commit in huggingface_hub.list_repo_commits(REPO)]
    assert titles == ["Add a", "Add model", "initial commit"]


def test_snapshot_is_what_was_pushed(pushed, folder, tmp_path_factory):
    snapshot = snapshot_download(REPO, local_dir=tmp_path_factory.mktemp("snapshot"))
    for path, content in pushed.files(REPO).items():
        assert open(f"{snapshot}/{path}", "rb").read() == content
    assert snapshot_download(REPO, allow_patterns="nested/*").endswith(pushed.commits(REPO)[-1].sha)


def test_model_info_reads_card_and_config(pushed):
    info = huggingface_hub.model_info(REPO, files_metadata=True)
    assert info.sha == pushed.commits(REPO)[-1].sha
    assert info.card_data.license == "apache-2.0"
    assert info.card_data.base_model == "org/base"
    assert {"transformers", "tiny", "license:apache-2.0", "base_model:org/base"} <= set(info.tags)
    assert info.config["model_type"] == "llama"
    assert info.gated is False
    sizes = {sibling.rfilename: sibling.lfs and sibling.lfs.size for sibling in info.siblings}
    assert sizes["model.safetensors"] == 7000
    assert sizes["config.json"] is None


def test_model_info_at_a_revision(pushed):
    first = pushed.commits(REPO)[-1].sha
    huggingface_hub.upload_file(path_or_fileobj=b"x", path_in_repo="later.txt", repo_id=REPO)
    siblings = huggingface_hub.model_info(REPO, revision=first).siblings
    assert "later.txt" not in [sibling.rfilename for sibling in siblings]


def test_paths_info_and_tree_tell_files_from_folders(pushed):
    file, nested = huggingface_hub.get_paths_info(REPO, ["model.safetensors", "nested"])[::-1]
    assert (file.path, file.size, file.lfs.size) == ("model.safetensors", 7000, 7000)
    assert nested.path == "nested"
    top = [entry.path for entry in huggingface_hub.list_repo_tree(REPO)]
    assert "nested" in top and "nested/other.safetensors" not in top
    assert [entry.path for entry in huggingface_hub.list_repo_tree(REPO, "nested")] == ["nested/other.safetensors"]


def test_card_with_a_bad_base_model_is_refused(pushed):
    with pytest.raises(ValueError, match="base_model.*is not valid"):
        ModelCard(CARD.replace("org/base", "../base")).push_to_hub(REPO)
    with pytest.raises(ValueError, match="Invalid YAML"):
        huggingface_hub.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert pushed.files(REPO)["README.md"] == CARD.encode()


@pytest.mark.parametrize("token", [None, False], ids=["owner", "nobody"])
def test_missing_repo_revision_and_file_are_told_apart(pushed, token):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("you/missing", "config.json", token=token)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="missing", token=token)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json", token=token)
    with pytest.raises(EntryNotFoundError):
        list(huggingface_hub.list_repo_tree(REPO, "missing", token=token))


def test_push_to_a_missing_repo_is_refused(hub):
    with pytest.raises(RepositoryNotFoundError, match="create_repo"):
        huggingface_hub.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="you/missing")


def test_gated_repo_opens_to_its_owner_and_to_the_admitted(pushed):
    pushed.gate(REPO)
    assert huggingface_hub.model_info(REPO, token=False).gated == "auto"
    for token, status in {False: 401, pushed.stranger_token: 403}.items():
        with pytest.raises(GatedRepoError) as error:
            hf_hub_download(REPO, "config.json", token=token)
        assert error.value.response.status_code == status
    assert hf_hub_download(REPO, "config.json")

    pushed.gate(REPO, admit=["stranger"])
    assert hf_hub_download(REPO, "README.md", token=pushed.stranger_token)


def test_private_repo_is_missing_to_others(pushed):
    huggingface_hub.update_repo_settings(REPO, private=True)
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.model_info(REPO, token=pushed.stranger_token)
    assert huggingface_hub.model_info(REPO).private


def test_deleted_repo_is_gone(pushed):
    huggingface_hub.delete_repo(REPO)
    assert not huggingface_hub.repo_exists(REPO)


def test_range_gives_the_middle_of_a_file(pushed):
    url = huggingface_hub.hf_hub_url(REPO, "model.safetensors")
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=7-13"})) as response:
        assert (response.status, response.read()) == (206, b"weights")
        assert response.headers["Content-Range"] == "bytes 7-13/7000"


def test_cut_off_download_is_resumed(pushed):
    pushed.fail_next("GET", "/resolve/main/model.safetensors", truncate_to=100)
    assert open(hf_hub_download(REPO, "model.safetensors"), "rb").read() == b"weights" * 1000
    assert [path for method, path in pushed.requests if method == "GET" and "/resolve/" in path] == [
        f"/{REPO}/resolve/main/model.safetensors"
    ] * 2


def test_failed_commit_changes_nothing(pushed):
    pushed.fail_next("POST", "/commit/")
    with pytest.raises(HfHubHTTPError, match="500"):
        huggingface_hub.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO)
    assert "x" not in pushed.files(REPO)
    huggingface_hub.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO)
    assert pushed.files(REPO)["x"] == b"x"


def test_commits_of_the_test_itself_are_like_a_clients(hub, folder):
    sha = hub.commit_folder(REPO, folder)
    assert huggingface_hub.model_info(REPO).sha == sha
    later = hub.commit(REPO, {"a.safetensors": b"a"}, deletions=["config.json"])
    assert [commit.sha for commit in hub.commits(REPO)] == [sha, later]
    assert open(hf_hub_download(REPO, "a.safetensors"), "rb").read() == b"a"
    assert "config.json" not in huggingface_hub.list_repo_files(REPO)
    assert "config.json" in huggingface_hub.list_repo_files(REPO, revision=sha)


def test_equal_repos_of_two_tests_have_different_commits(hub):
    first = hub.commit(REPO, {"a": b"a"})
    hub.reset()
    assert hub.commit(REPO, {"a": b"a"}) != first


@pytest.mark.parametrize("family", ["llama", "bluelm"])
def test_transformers_loads_a_pushed_base(hub, tmp_path, family):
    huggingface_hub.create_repo(REPO)
    first = huggingface_hub.upload_folder(repo_id=REPO, folder_path=save_tiny_base(family, tmp_path / "1")).oid
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=save_tiny_base(family, tmp_path / "2", seed=2))
    trust = {"trust_remote_code": family == "bluelm"}

    assert AutoConfig.from_pretrained(REPO, **trust).vocab_size == 128
    assert AutoTokenizer.from_pretrained(REPO, **trust)("Read")["input_ids"]
    for revision, seed in {"main": {"seed": 2}, first: {}}.items():
        model = AutoModelForCausalLM.from_pretrained(REPO, revision=revision, **trust)
        assert torch.equal(model(PROMPT).logits, tiny_base(family, **seed)(PROMPT).logits)


def test_transformers_pushes_a_model(hub):
    tiny_base("llama").push_to_hub(REPO)
    assert "model.safetensors" in hub.files(REPO)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(REPO)(PROMPT).logits, tiny_base("llama")(PROMPT).logits)


def test_peft_loads_a_pushed_adapter_from_a_subfolder(hub, tmp_path):
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_base("llama"), settings).eval()
    adapted.save_pretrained(tmp_path / "language_adapter")
    hub.commit_folder(REPO, tmp_path)

    loaded = PeftModel.from_pretrained(tiny_base("llama"), REPO, subfolder="language_adapter").eval()

    assert torch.equal(loaded(PROMPT).logits, adapted(PROMPT).logits)
    assert not torch.equal(loaded(PROMPT).logits, tiny_base("llama")(PROMPT).logits)


def test_transformers_says_why_it_cannot_load(hub, tmp_path):
    hub.commit_folder(REPO, save_tiny_base("llama", tmp_path))
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("you/missing")
    with pytest.raises(OSError, match="not a valid git identifier"):
        AutoModelForCausalLM.from_pretrained(REPO, revision="missing")
    hub.gate(REPO)
    with pytest.raises(OSError, match="gated repo"):
        AutoModelForCausalLM.from_pretrained(REPO, token=hub.stranger_token)


def test_cached_model_loads_without_network(hub, tmp_path, request):
    hub.commit_folder(REPO, save_tiny_base("llama", tmp_path))
    AutoModelForCausalLM.from_pretrained(REPO)
    request.getfixturevalue("no_network")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("you/never-seen", "config.json")
    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(model(PROMPT).logits, tiny_base("llama")(PROMPT).logits)


def test_process_with_the_environment_sees_this_hub_as_its_user(pushed, tmp_path):
    code = "import huggingface_hub, json; print(json.dumps([huggingface_hub.whoami()['name'], "
    code += f"huggingface_hub.hf_hub_download('{REPO}', 'config.json')]))"
    for token, name in {pushed.token: "you", pushed.stranger_token: "stranger"}.items():
        result = subprocess.run(
            [sys.executable, "-c", code], env=pushed.env(token), cwd=tmp_path, capture_output=True, check=True
        )
        user, path = json.loads(result.stdout)
        assert user == name
        assert path.startswith(str(pushed.home))


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://huggingface.co"], ids=["address", "name"])
def test_nothing_outside_can_be_reached(url, tmp_path):
    with pytest.raises(OSError, match="may only talk to this computer"):
        urllib.request.urlopen(url, timeout=1)
    code = f"import urllib.request; urllib.request.urlopen('{url}', timeout=1)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "may only talk to this computer" in result.stderr
