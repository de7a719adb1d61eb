"""`genieblue serve`: the command line of vLLM with its limits, and what is told before it starts."""

import json
import socket
import sys
from types import ModuleType

import pytest
from command_line import error_of
from tiny_genieblue import save_tiny_pair
from tiny_vlms import save_tiny_vlm_pair

from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from genieblue.serving.vllm.server import ServerSettings


def options(**settings):
    """The options of vLLM by name, as strings."""
    command = ServerSettings("you/genieblue-3b", **settings).command()
    return dict(zip(command[3::2], command[4::2], strict=False))


def test_a_server_listens_on_loopback_fetches_nothing_and_limits_images():
    found, variables = options(), ServerSettings("you/genieblue-3b").environment()
    assert found["--host"] == "127.0.0.1" and json.loads(found["--limit-mm-per-prompt"]) == {"image": 8}
    assert variables["VLLM_MEDIA_CONNECTOR"] == "genieblue"
    assert variables["VLLM_MAX_IMAGE_PIXELS"] == "40000000"
    assert "--trust-remote-code" not in found


def test_an_allowed_host_is_fetched_from_and_leads_nowhere_else():
    settings = ServerSettings("you/genieblue-3b", allow_domains=["images.example"])
    assert settings.command()[-2:] == ["--allowed-media-domains", "images.example"]
    assert settings.environment()["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_another_base_is_one_of_another_revision(tmp_path):
    found = json.loads(options(base=str(tmp_path))["--hf-overrides"])
    assert found == {"base_model_name_or_path": str(tmp_path), "base_model_revision": None}


def test_a_folder_is_served_by_its_name(tmp_path):
    assert ServerSettings(str(tmp_path)).name == tmp_path.name
    assert ServerSettings("you/genieblue-3b", host="0.0.0.0").address == "http://127.0.0.1:8000"


def test_without_vllm_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "genieblue[vllm]" in (error := error_of("serve", "you/genieblue-3b")) and error.count("\n") == 1


@pytest.fixture
def vllm(monkeypatch):
    """A module with the version of vLLM, and none of the rest."""

    def install(version):
        package, versions = ModuleType("vllm"), ModuleType("vllm._version")
        package.__path__, versions.__version__ = [], version
        monkeypatch.setitem(sys.modules, "vllm", package)
        monkeypatch.setitem(sys.modules, "vllm._version", versions)

    return install


def test_another_version_of_vllm_is_refused_with_both(vllm):
    vllm("0.99.1")
    error = error_of("serve", "you/genieblue-3b")
    assert "vLLM 0.32" in error and "0.99.1" in error


def test_a_model_that_cannot_be_served_is_told_before_vllm_starts(vllm, tmp_path):
    vllm("0.32.0+cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama' model, expected 'genieblue'" in error_of("serve", tmp_path)


def test_an_address_that_is_taken_is_told_before_vllm_starts(vllm, tmp_path):
    vllm("0.32.0")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = error_of("serve", save_tiny_pair(tmp_path, "llama"), "--port", port)
    assert f"port {port}: Address already in use. Give another --port" in message


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--port=9000", "--port"),
        ("--served_model_name", "--served-model-name"),
        ("-tp", "-tp"),
        ("-tp2", "-tp2"),
        ("--hf-overrides", "--hf-overrides"),
        ("--limit-mm-per-prompt.image", "--limit-mm-per-prompt"),
        ("--limit_mm_per_prompt.image=99", "--limit-mm-per-prompt"),
        ("--limit-mm", "--limit-mm"),  # vLLM's parser knows it by its beginning
        ("--allowed-media-domains+", "--allowed-media-domains"),
        ("--ssl-keyfile", "--ssl-keyfile"),
        ("--grpc", "--grpc"),
    ],
)
def test_options_that_would_be_set_twice_are_refused(option, name):
    with pytest.raises(ValueError, match=f"^{name}(:| is)"):
        ServerSettings("you/genieblue-3b", other=["--gpu-memory-utilization", "0.8", option, "2"])


def test_options_whose_names_begin_alike_are_vllms():
    other = ["--max-num-seqs", "4", "--limit-mm-per-prompt-of-another", "--enforce-eager", "-O3"]
    assert ServerSettings("you/genieblue-3b", other=other).command()[-len(other) :] == other


def test_a_genieblue_of_a_vlm_is_refused_before_vllm_starts(vllm, tmp_path):
    vllm("0.32.0")
    base, tower = save_tiny_vlm_pair(tmp_path)[::-1]
    extract_genieblue(tower, base, tmp_path / "mine", Choice(rank=2))
    assert "sees with a whole VLM" in error_of("serve", tmp_path / "mine")
