"""Quantized models on the Hub and in clean processes: their own code alone, no compiler, the right commit."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from clean_process import ask, run_clean
from tiny_quantized import TEXT, answers, large_pair, load, load_base, quantize, quantized_pair, same, trust_of
from transformers import AutoModel, AutoTokenizer

from modeling_genieblue.base_identity_genieblue import weight_file_hashes

BASE, REPO = "you/base-llm-w4a16", "you/genieblue-w4a16"
MIXES = {"llama-tied": {"lm_head": "w8a16", "embeddings": "w8a16"}, "bluelm": {}}


def publish(hub, folder):
    """Both folders of a quantized pair as repositories; the GenieBlue names its base by id and commit."""
    sha = hub.commit_folder(BASE, folder / "base")
    hub.commit_folder(REPO, folder / "genieblue")
    config = json.loads((folder / "genieblue/config.json").read_text())
    config |= {"base_model_name_or_path": BASE, "base_model_revision": sha}
    hub.commit(REPO, {"config.json": json.dumps(config).encode()})
    return sha


def published_self_contained(hub, tmp_path, family="llama", **recipe):
    quantize(large_pair(family), tmp_path, {"self_contained": True, **trust_of(family)}, **recipe)
    hub.commit_folder(REPO, tmp_path / "genieblue")
    return tmp_path / "genieblue"


# Clean processes


@pytest.mark.parametrize("family", MIXES)
def test_clean_process_loads_both_repositories(family, hub, tmp_path):
    folder = quantized_pair(family, **MIXES[family])
    publish(hub, folder)
    code = f"""
    from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
    model = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained({BASE!r}, trust_remote_code=True)
    again = AutoModelForCausalLM.from_pretrained({BASE!r}, trust_remote_code=True)
    onto = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True, base_model=base)
    text = torch.arange(20, 29)[None]
    with torch.no_grad():
        logits = [each(text).logits for each in (model, base, again, onto)]
    assert onto.language_model is base
    assert all(torch.equal(logits[0], each) for each in logits)
    processor = AutoProcessor.from_pretrained({REPO!r}, trust_remote_code=True)
    AutoTokenizer.from_pretrained({BASE!r})
    model.save_pretrained("saved")
    answer([ask(model), processor.image_token_id, type(model).__module__.split(".")[0], ask(onto)])
    """
    found, image_token_id, module, onto = run_clean(code, tmp_path, hub.env())
    expected = ask(load(folder / "genieblue", **trust_of(family)))
    assert found == onto == expected
    assert (image_token_id, module) == (128, "transformers_modules")
    assert ask(load(tmp_path / "saved", **trust_of(family))) == expected


@pytest.mark.parametrize("first, family", [("base", "bluelm"), ("genieblue", "bluelm"), ("genieblue", "llama-tied")])
def test_order_of_loading_in_one_process_does_not_matter(first, family, hub, tmp_path):
    """transformers remembers classes of remote code by their configuration."""
    folder, plain = quantized_pair(family, **MIXES[family]), large_pair(family).parent / "base-llm"
    code = f"""
    from transformers import AutoModel, AutoModelForCausalLM
    def load_base(): return AutoModelForCausalLM.from_pretrained({str(folder / "base")!r}, trust_remote_code=True)
    def load_plain(): return AutoModelForCausalLM.from_pretrained({str(plain)!r}, trust_remote_code=True)
    def load(): return AutoModel.from_pretrained({str(folder / "genieblue")!r}, trust_remote_code=True)
    calls = {{"base": [load_base, load, load_plain, load_base, load], "genieblue": [load, load_plain, load_base]}}
    text = torch.arange(20, 29)[None]
    with torch.no_grad():
        answer([each()(text).logits.double().tolist() for each in calls[{first!r}]])
    """
    text = torch.arange(20, 29)[None]
    with torch.no_grad():
        quantized, unquantized = (load_base(path)(text).logits.double().tolist() for path in (folder / "base", plain))
    expected = {"base": [quantized, quantized, unquantized, quantized, quantized],
                "genieblue": [quantized, unquantized, quantized]}[first]  # fmt: skip
    assert run_clean(code, tmp_path, hub.env()) == expected


@pytest.mark.parametrize("family", MIXES)
def test_clean_process_loads_a_self_contained_repository(family, hub, tmp_path):
    folder = published_self_contained(hub, tmp_path / "made", family, **MIXES[family])
    code = f"""
    from transformers import AutoModel
    model = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)
    model.save_pretrained("saved")
    answer(ask(model))
    """
    expected = ask(load(folder, **trust_of(family)))
    assert run_clean(code, tmp_path, hub.env()) == expected
    assert ask(load(tmp_path / "saved", **trust_of(family))) == expected


def test_nothing_is_compiled_and_no_compiler_is_needed(tmp_path):
    """quanto compiles an extension, in its own folder or in TORCH_EXTENSIONS_DIR, when it first unpacks 4 bits."""
    folder = quantized_pair()
    (tmp_path / "bin").mkdir()
    (tmp_path / "extensions").mkdir(mode=0o555)
    code = f"""
    import pathlib, shutil
    import optimum.quanto
    from transformers import AutoModel
    assert not any(map(shutil.which, ("g++", "c++", "gcc", "cc", "clang", "ninja", "nvcc")))
    built = pathlib.Path(optimum.quanto.__file__).parent / "library/extensions"
    before = sorted(map(str, built.rglob("*.so"))), sorted(map(str, built.rglob("build*")))
    import torch.utils.cpp_extension
    def refuse(*args, **kwargs): raise AssertionError("something is being compiled")
    torch.utils.cpp_extension.load = torch.utils.cpp_extension.load_inline = refuse
    answers = []
    for dtype in ("bfloat16", "float16", "float32"):
        model = AutoModel.from_pretrained({str(folder / "genieblue")!r}, trust_remote_code=True, dtype=dtype)
        answers.append(ask(model)[2])
        model.train()
        model(torch.arange(20, 29)[None], view="multimodal", labels=torch.arange(20, 29)[None]).loss.backward()
    after = sorted(map(str, built.rglob("*.so"))), sorted(map(str, built.rglob("build*")))
    answer([before == after, os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]), answers])
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    unchanged, extensions, found = run_clean(code, tmp_path, environment)
    assert unchanged and extensions == []
    assert found == [ask(load(folder / "genieblue", dtype=dtype))[2] for dtype in ("bfloat16", "float16", "float32")]


def test_clean_process_without_quanto_is_told_what_to_install(tmp_path):
    folder = quantized_pair()
    code = f"""
    class NoQuanto:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "optimum":
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, NoQuanto())
    from transformers import AutoModel, AutoModelForCausalLM
    plain = AutoModel.from_pretrained({str(large_pair())!r}, trust_remote_code=True)
    messages = []
    for auto, path in ((AutoModel, {str(folder / "genieblue")!r}), (AutoModelForCausalLM, {str(folder / "base")!r})):
        try:
            auto.from_pretrained(path, trust_remote_code=True)
        except ImportError as error:
            messages.append(str(error))
    answer([messages, len(ask(plain))])
    """
    messages, number = run_clean(code, tmp_path, dict(os.environ))
    assert number == 3
    assert len(messages) == 2 and all("pip install" in message and "quanto" in message for message in messages)


def test_code_in_the_folders_is_not_run_without_trust(tmp_path):
    folder = quantized_pair()
    code = f"""
    from transformers import AutoModel, AutoModelForCausalLM
    refused = []
    for auto, path in ((AutoModel, {str(folder / "genieblue")!r}), (AutoModelForCausalLM, {str(folder / "base")!r})):
        try:
            auto.from_pretrained(path, trust_remote_code=False)
        except (ValueError, OSError) as error:
            refused.append(type(error).__name__)
    answer([refused, any("quantiz" in name for name in sys.modules if name.startswith("transformers_modules"))])
    """
    refused, ran = run_clean(code, tmp_path, dict(os.environ))
    assert len(refused) == 2 and not ran


# The Hub, with the package


def test_base_is_loaded_at_its_commit_when_it_moved_on(hub):
    folder = quantized_pair()
    publish(hub, folder)
    hub.commit_folder(BASE, quantized_pair(llm="w8a16", rounding="rtn") / "base")
    expected = answers(load(folder / "genieblue"))
    assert same(answers(load(REPO)), expected)
    assert same(answers(AutoModel.from_pretrained(REPO)), expected)
    with pytest.raises(ValueError, match="is not the base"):
        load(REPO, base_model=load_base(BASE))
    assert torch.equal(load_base(BASE, revision=hub.commits(BASE)[0].sha)(TEXT).logits, expected[0])


def test_code_of_a_base_is_that_of_its_commit(hub):
    """Remote code that was changed after the commit that was recorded must not run."""
    folder = quantized_pair("bluelm")
    publish(hub, folder)
    (name,) = [name for name in hub.files(BASE) if name.startswith("modeling_")]
    hub.commit(BASE, {name: b"raise RuntimeError('newer code than was asked for')\n"})
    model = load(REPO, trust_remote_code=True)
    assert same(answers(model), answers(load(folder / "genieblue", trust_remote_code=True)))


def test_base_exchanged_under_its_commit_is_refused_by_its_hash(hub, tmp_path):
    folder = shutil.copytree(quantized_pair(llm="w8a16", rounding="rtn"), tmp_path / "pair")
    config = json.loads((folder / "genieblue/config.json").read_text())
    (name,) = config["base_model_fingerprint"]
    content = bytearray((folder / "base" / name).read_bytes())
    content[-1] ^= 1  # one code of one layer
    (folder / "base" / name).write_bytes(content)
    publish(hub, folder)
    with pytest.raises(ValueError, match="sha256"):
        load(REPO)


def test_published_base_is_used_for_another_adapter(hub, tmp_path):
    sha = publish(hub, quantized_pair())
    report = quantize(large_pair(), tmp_path, {"quantized_base": BASE})
    config = json.loads((tmp_path / "genieblue/config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"], report.base) == (BASE, sha, BASE)
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair() / "genieblue")))
    load(tmp_path / "genieblue").push_to_hub("you/pushed")
    assert same(answers(load("you/pushed")), answers(load(tmp_path / "genieblue")))
    assert huggingface_hub.model_info("you/pushed").card_data.base_model_relation == "quantized"
    assert {"quanto_qmap.json", "language_adapter/quantized_adapter.safetensors"} <= set(hub.files("you/pushed"))
    assert "language_adapter/adapter_model.safetensors" not in hub.files("you/pushed")


def test_loaded_quantized_model_is_pushed_again_as_it_is(hub):
    publish(hub, quantized_pair())
    load(REPO).push_to_hub("you/copy")
    first, second = hub.files(REPO), hub.files("you/copy")
    names = [name for name in first if name.endswith((".safetensors", "quanto_qmap.json"))]
    assert len(names) == 4
    assert all(first[name] == second[name] for name in names)
    assert same(answers(load("you/copy")), answers(load(REPO)))


def test_source_on_the_hub_is_quantized(hub, tmp_path):
    source_base = hub.commit_folder("you/base-llm", large_pair().parent / "base-llm")
    config = json.loads((large_pair() / "config.json").read_text())
    hub.commit_folder("you/genieblue", large_pair())
    config |= {"base_model_name_or_path": "you/base-llm", "base_model_revision": source_base}
    hub.commit("you/genieblue", {"config.json": json.dumps(config).encode()})
    quantize("you/genieblue", tmp_path)
    expected = quantized_pair()
    assert same(answers(load(tmp_path / "genieblue")), answers(load(expected / "genieblue")))
    settings = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]
    assert (settings["source"]["name"], settings["source"]["revision"]) == ("you/base-llm", source_base)
    assert settings["source"]["fingerprint"] == weight_file_hashes(large_pair().parent / "base-llm")
    own = json.loads((tmp_path / "genieblue/config.json").read_text())["quantization"]["source"]
    assert own == {
        "name": "you/genieblue",
        "revision": hub.commits("you/genieblue")[-1].sha,
        "fingerprint": config["weight_fingerprint"],
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()


def test_private_repositories_are_quantized_with_a_token(hub, tmp_path, monkeypatch):
    publish(hub, quantized_pair())
    for repo in (BASE, REPO):
        huggingface_hub.update_repo_settings(repo, private=True)
    monkeypatch.delenv("HF_TOKEN")
    access = {"token": hub.token, "cache_dir": tmp_path / "cache"}
    model = load(REPO, **access)
    assert same(answers(model), answers(load(quantized_pair() / "genieblue")))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/quanto_qmap.json").is_file()
    quantize(large_pair(), tmp_path / "new", {"quantized_base": BASE, **access})
    assert same(answers(load(tmp_path / "new/genieblue", **access)), answers(model))


@pytest.mark.parametrize("repository", ["two", "self-contained"])
def test_cached_repositories_load_without_network(repository, hub, tmp_path, request):
    if repository == "two":
        publish(hub, quantized_pair())
    else:
        published_self_contained(hub, tmp_path)
    expected = answers(load(REPO))
    request.getfixturevalue("no_network")
    for options in ({}, {"local_files_only": True}):
        assert same(answers(load(REPO, **options)), expected)
    load(REPO).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()


def test_self_contained_repository_at_a_revision(hub, tmp_path):
    published_self_contained(hub, tmp_path / "one")
    first = hub.commits(REPO)[-1].sha
    other = published_self_contained(hub, tmp_path / "two", llm="w8a16", rounding="rtn")
    assert same(answers(load(REPO, revision=first)), answers(load(tmp_path / "one/genieblue")))
    assert same(answers(load(REPO)), answers(load(other)))
    assert not same(answers(load(REPO)), answers(load(REPO, revision=first)))
