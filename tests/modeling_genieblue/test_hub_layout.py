"""The layout on the Hub, over HTTP with the real clients: pushed as one commit, loaded at a revision, stock PEFT."""

import json
import logging
import shutil

import huggingface_hub
import pytest
import torch
from clean_process import ask, run_clean
from peft import PeftModel
from tiny_genieblue import IMAGE, change_adapter, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import save_tiny_base, tiny_base
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from modeling_genieblue import GenieBlueForConditionalGeneration

BASE, REPO = "you/base-llm", "you/genieblue-tiny"
REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
ADAPTER = "language_adapter/adapter_model.safetensors"


def load(repo=REPO, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(repo, **kwargs)


@torch.no_grad()
def logits(model):
    return torch.cat([model(prompt(9)).logits, model(REQUEST, pixel_values=PIXELS).logits], dim=1)


@pytest.fixture
def base(hub, tmp_path):
    """A Hub with a base, of which there is an older revision, `v1`; the sha of the newer one."""
    hub.commit_folder(BASE, save_tiny_base("llama", tmp_path / "older", seed=2))
    huggingface_hub.create_tag(BASE, tag="v1")
    return hub.commit_folder(BASE, save_tiny_base("llama", tmp_path / "newer"))


@pytest.fixture
def model(base):
    """A GenieBlue on the Hub's base."""
    return tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(BASE))


@pytest.fixture
def pushed(hub, model):
    model.push_to_hub(REPO)
    return model


# Pushing


def test_push_is_one_commit_of_what_is_ours(hub, model, base):
    before = hub.files(BASE), len(hub.commits(BASE))
    info = model.push_to_hub(REPO, commit_message="First light", commit_description="Sees.")
    (commit,) = hub.commits(REPO)
    assert (commit.title, commit.description, commit.sha) == ("First light", "Sees.", info.oid)
    assert (hub.files(BASE), len(hub.commits(BASE))) == before

    files = hub.files(REPO)
    assert "adapter_config.json" not in files
    assert {"config.json", "model.safetensors", ADAPTER, "language_adapter/adapter_config.json", "README.md",
            "processor_config.json", "tokenizer.json", "base_fingerprint.json"} <= set(files)  # fmt: skip
    assert {"modeling_genieblue.py", "configuration_genieblue.py", "processing_genieblue.py"} <= set(files)
    ours = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    added = sum(tensor.numel() for tensor in model.state_dict().values())
    assert ours <= added * 4 * 1.01 + 20_000

    config = json.loads(files["config.json"])
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == (BASE, base)
    sha256 = hub.commits(BASE)[-1].files["model.safetensors"].sha256
    assert config["base_model_fingerprint"] == {"model.safetensors": sha256}
    adapter = json.loads(files["language_adapter/adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE, base)
    assert huggingface_hub.model_info(REPO).card_data.base_model == BASE


def test_revision_of_the_base_is_the_one_that_was_loaded(hub, base):
    """Not the one that happens to be the newest."""
    older = hub.commits(BASE)[0].sha
    for kwargs in ({"revision": "v1"}, {"revision": older}):
        model = tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(BASE, **kwargs))
        assert model.config.base_model_revision == older
    model.push_to_hub(REPO)
    assert torch.equal(logits(load()), logits(model))
    assert torch.equal(load()(prompt()).logits, tiny_base("llama", seed=2)(prompt()).logits)


def test_base_that_moved_on_after_loading_is_recorded_as_loaded(hub, base, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(BASE)
    hub.commit_folder(BASE, save_tiny_base("llama", tmp_path / "newest", seed=3))
    assert tiny_genieblue(base=loaded).config.base_model_revision == base


@pytest.mark.parametrize("options", [{"base_model_name_or_path": BASE, "base_model_revision": "v1"},
                                     {"base_model_name_or_path": BASE}], ids=["tag", "newest"])  # fmt: skip
def test_base_can_be_named_by_hand(hub, base, options):
    expected = hub.commits(BASE)[0].sha if "base_model_revision" in options else base
    seed = {"seed": 2} if "base_model_revision" in options else {}
    model = tiny_genieblue(base=tiny_base("llama", **seed), **options)
    assert (model.config.base_model_name_or_path, model.config.base_model_revision) == (BASE, expected)
    model.push_to_hub(REPO)
    assert torch.equal(logits(load()), logits(model))


def test_local_base_is_not_published(hub, tmp_path):
    folder = save_tiny_pair(tmp_path)
    for model in (load(folder), tiny_genieblue()):
        with pytest.raises(ValueError, match="base.*Hub"):
            model.push_to_hub(REPO)
    assert ("model", REPO) not in hub.storage.repos


def test_second_push_keeps_the_readme_and_removes_stale_files(hub, pushed):
    card = hub.files(REPO)["README.md"] + b"\nMy own words.\n"
    kept = {"README.md": card, "notes.txt": b"n", "quantized/model.safetensors": b"q", "demo.py": b"d",
            "other_adapter/adapter_config.json": b"{}"}  # fmt: skip
    stale = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"s",
             "adapter_config.json": b"{}"}  # fmt: skip
    hub.commit(REPO, {**kept, **stale})
    change_adapter(pushed).push_to_hub(REPO)
    files = hub.files(REPO)
    assert {name: files.get(name) for name in kept} == kept
    assert not set(stale) & set(files)
    assert len(hub.commits(REPO)) == 3
    assert torch.equal(logits(load()), logits(pushed))


def test_failed_push_leaves_the_repo_as_it_was(hub, pushed):
    before = hub.files(REPO)
    hub.fail_next("POST", "/commit/")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        change_adapter(pushed).push_to_hub(REPO)
    assert hub.files(REPO) == before


def test_push_into_a_branch_and_as_private(hub, model):
    model.push_to_hub(REPO, private=True)
    assert huggingface_hub.model_info(REPO).private
    changed = logits(change_adapter(model))
    model.push_to_hub(REPO, revision="next")
    assert len(hub.commits(REPO)) == 1
    assert torch.equal(logits(load(revision="next")), changed)
    assert not torch.equal(logits(load()), changed)


def test_save_can_push_too(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "genieblue-tiny", push_to_hub=True)
    assert len(hub.commits(REPO)) == 1
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="you/named")
    assert len(hub.commits("you/named")) == 1


def test_loaded_model_is_pushed_again_as_it_is(hub, pushed, base):
    load().push_to_hub("you/copy")
    first, second = hub.files(REPO), hub.files("you/copy")
    assert first.keys() == second.keys()
    for name in ("model.safetensors", ADAPTER, "base_fingerprint.json", "tokenizer.json", "processor_config.json"):
        assert first[name] == second[name], name


# Loading


def test_loads_at_a_revision(hub, pushed):
    first, expected = hub.commits(REPO)[-1].sha, logits(pushed)
    change_adapter(pushed).push_to_hub(REPO)
    assert torch.equal(logits(load(revision=first)), expected)
    assert torch.equal(logits(AutoModel.from_pretrained(REPO, revision=first)), expected)
    assert torch.equal(logits(load()), logits(pushed))
    assert not torch.equal(logits(load()), expected)


def test_loads_at_its_bases_commit_when_the_base_moved_on(hub, pushed, tmp_path):
    hub.commit_folder(BASE, save_tiny_base("llama", tmp_path / "newest", seed=3))
    loaded = load()
    assert torch.equal(logits(loaded), logits(pushed))
    with pytest.raises(ValueError, match="is not the base"):
        load(base_model=AutoModelForCausalLM.from_pretrained(BASE))


def test_base_whose_file_was_exchanged_under_its_commit_is_refused(hub, pushed, tmp_path):
    """The cache names files by their sha256, which is compared without reading them."""
    other = save_tiny_base("llama", tmp_path / "exchanged")
    loaded = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():  # beyond the sampled values
        loaded.model.layers[0].mlp.up_proj.weight[0, 1] += 1
    loaded.save_pretrained(other)
    sha = hub.commit_folder("you/fine-tune", other)
    config = json.loads(hub.files(REPO)["config.json"])
    config |= {"base_model_name_or_path": "you/fine-tune", "base_model_revision": sha}
    hub.commit(REPO, {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="sha256"):
        load()


def test_clean_process_loads_it_through_the_auto_classes(hub, pushed, tmp_path):
    code = f"""
    from transformers import AutoModel, AutoProcessor, AutoTokenizer
    model = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained({REPO!r}, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained({REPO!r})
    chat = [{{"role": "user", "content": "Read"}}]
    same = tokenizer.apply_chat_template(chat) == AutoTokenizer.from_pretrained({BASE!r}).apply_chat_template(chat)
    model.push_to_hub("you/from-remote-code")
    answer([ask(model), processor.image_token_id, same, type(model).__module__.split(".")[0]])
    """
    answers, image_token_id, same, module = run_clean(code, tmp_path, hub.env())
    assert answers == ask(pushed)
    assert (image_token_id, same, module) == (128, True, "transformers_modules")
    assert len(hub.commits("you/from-remote-code")) == 1
    assert ask(load("you/from-remote-code")) == answers


def test_stock_peft_loads_the_adapter_from_its_subfolder(pushed):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    peft_model = PeftModel.from_pretrained(base, REPO, subfolder="language_adapter").eval()
    with torch.no_grad():
        expected = pushed(prompt(), view="multimodal").logits
        torch.testing.assert_close(peft_model(prompt()).logits, expected, atol=5e-5, rtol=1e-4)


def test_processor_and_tokenizer_load(pushed, tmp_path):
    assert AutoProcessor.from_pretrained(REPO).image_seq_length == 4
    assert AutoTokenizer.from_pretrained(REPO).get_vocab() == AutoTokenizer.from_pretrained(BASE).get_vocab()


def test_token_and_cache_reach_the_base(hub, pushed, tmp_path, monkeypatch):
    huggingface_hub.update_repo_settings(BASE, private=True)
    huggingface_hub.update_repo_settings(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="genieblue-tiny"):
        load(cache_dir=tmp_path / "cache")
    assert torch.equal(logits(load(cache_dir=tmp_path / "cache", token=hub.token)), logits(pushed))
    assert {path.name for path in (tmp_path / "cache").iterdir()} >= {
        "models--you--base-llm", "models--you--genieblue-tiny"
    }  # fmt: skip
    assert torch.equal(logits(load(cache_dir=tmp_path / "cache", local_files_only=True)), logits(pushed))


def test_token_and_cache_reach_what_a_save_looks_up(hub, pushed, base, tmp_path, monkeypatch):
    for repo in (BASE, REPO):
        huggingface_hub.update_repo_settings(repo, private=True)
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(hub.home / "hub")  # what the test's own push had put into the default cache
    access = {"token": hub.token, "cache_dir": tmp_path / "cache"}
    loaded = load(**access)
    loaded.config.base_model_fingerprint = None  # as models that were saved without it
    loaded.save_pretrained(tmp_path / "saved")
    new = tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(BASE, **access), hub_kwargs=access)
    assert new.config.base_model_revision == base
    new.save_pretrained(tmp_path / "new")
    for folder in (tmp_path / "saved", tmp_path / "new"):
        config = json.loads((folder / "config.json").read_text())
        assert list(config["base_model_fingerprint"]) == ["model.safetensors"]
    assert (tmp_path / "new/tokenizer.json").is_file()


def test_gated_base_is_named(hub, pushed, tmp_path):
    hub.gate(BASE)
    with pytest.raises(OSError, match="gated") as error:
        load(token=hub.stranger_token, cache_dir=tmp_path / "cache")
    assert BASE in str(error.value) and "base_model=" in str(error.value)


def test_missing_repos_are_named(hub, pushed, tmp_path):
    with pytest.raises(OSError, match="you/missing"):
        load("you/missing")
    huggingface_hub.delete_repo(BASE)
    with pytest.raises(OSError, match=f"(?s){BASE}.*base_model="):
        load(cache_dir=tmp_path / "cache")


def test_missing_revision_is_named(pushed):
    with pytest.raises(OSError, match="no-such-tag"):
        load(revision="no-such-tag")


def test_repo_with_an_adapter_in_its_root_is_refused(hub, pushed):
    hub.commit(REPO, {"adapter_config.json": hub.files(REPO)["language_adapter/adapter_config.json"]})
    with pytest.raises(ValueError, match="adapter_config.json in its root"):
        load()


def test_cut_off_download_does_not_reach_the_model(hub, pushed, tmp_path):
    hub.fail_next("GET", f"{REPO}/resolve/", truncate_to=100)
    assert torch.equal(logits(load(cache_dir=tmp_path / "cache")), logits(pushed))


def test_cached_model_loads_without_network(pushed, request):
    expected = logits(load())
    request.getfixturevalue("no_network")
    assert torch.equal(logits(load()), expected)
    assert torch.equal(logits(load(local_files_only=True)), expected)
    assert torch.equal(logits(AutoModel.from_pretrained(REPO)), expected)


@pytest.mark.parametrize("cached", ["nothing", "only ours"])
def test_without_network_and_cache_the_missing_repo_is_named(cached, pushed, request, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    if cached == "only ours":
        huggingface_hub.snapshot_download(REPO, **options)
    request.getfixturevalue("no_network")
    with pytest.raises(OSError, match=BASE if cached == "only ours" else REPO):
        load(**options)


def test_model_of_the_hub_is_saved_with_its_base_by_name(hub, pushed, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load().save_pretrained(tmp_path / "local")
    config = json.loads((tmp_path / "local/config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == (BASE, hub.commits(BASE)[-1].sha)
    assert torch.equal(logits(load(tmp_path / "local")), logits(pushed))
    assert not caplog.records
