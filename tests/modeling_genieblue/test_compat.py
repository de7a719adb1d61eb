"""Libraries that are too old: one sentence, at the first import, whatever is loaded first. And a cache's two names."""

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from tiny_genieblue import save_tiny_pair
from transformers import cache_utils, dynamic_module_utils

from modeling_genieblue import compat_genieblue
from modeling_genieblue.compat_genieblue import adapt_to_cache_of_generate, require_peft, require_transformers

TRANSFORMERS = f"GenieBlue needs transformers 5.12 or newer; {transformers.__version__} is installed: "
PEFT = "GenieBlue needs peft 0.18 or newer; 0.17.1 is installed (no HybridCache): pip install -U peft"


def copies_code_as_before_5_10():
    modules_needed = []
    return modules_needed


@pytest.mark.parametrize("trait", [
    (compat_genieblue.transformers, "PreTrainedConfig", object),
    (dynamic_module_utils, "get_cached_module_file", copies_code_as_before_5_10),
    (cache_utils, "LAYER_TYPE_CACHE_MAPPING", {}),
], ids=["before 5.4", "before 5.10", "before 5.12"])  # fmt: skip
def test_old_transformers_is_known_by_its_traits(trait, monkeypatch):
    require_transformers()
    monkeypatch.setattr(*trait, raising=False)
    with pytest.raises(ImportError) as error:
        require_transformers()
    assert str(error.value) == TRANSFORMERS + "pip install -U transformers"


def test_old_peft_that_can_be_imported_is_known_by_its_trait(monkeypatch):
    require_peft()
    monkeypatch.setattr(LoraLayer, "dora_init", lambda: None, raising=False)
    with pytest.raises(ImportError, match=r"^GenieBlue needs peft 0\.18 or newer; .* is installed: pip install"):
        require_peft()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def run(code: str, cwd: Path, **environment: str) -> list[str]:
    """The lines that `code` prints in a process of its own."""
    environment = {**os.environ, "HF_HOME": str(cwd / "hf-home"), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_way_into_a_folders_code_names_old_transformers(folder, tmp_path):
    code = f"""
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
sys.modules["transformers"].PreTrainedConfig = object  # which in old versions is no dataclass
for each in (AutoImageProcessor, AutoProcessor, AutoConfig, AutoModel):
    try:
        each.from_pretrained({str(folder)!r}, trust_remote_code=True)
    except ImportError as error:
        print(error)
"""
    assert run(code, tmp_path) == [f"{TRANSFORMERS}pip install -U transformers"] * 4


def test_folders_code_names_peft_that_cannot_be_imported(folder, tmp_path):
    """transformers imports by itself what code asks for outside of a try, and fails with peft's own error then."""
    old = tmp_path / "old"
    (old / "peft").mkdir(parents=True)
    (old / "peft/__init__.py").write_text("raise ImportError('no HybridCache')\n")
    (old / "peft-0.17.1.dist-info").mkdir()
    (old / "peft-0.17.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.17.1\n")
    code = f"""
from transformers import AutoModel
try:
    AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
    assert error.__suppress_context__ and error.__cause__ is None  # the sentence is the whole traceback's message
"""
    assert run(code, tmp_path, PYTHONPATH=os.pathsep.join([str(old), os.environ["PYTHONPATH"]])) == [PEFT]


def test_settings_and_processor_do_without_peft(folder, tmp_path):
    """A serving engine with its own LoRA has none."""
    code = f"""
import sys
sys.modules["peft"] = None
from transformers import AutoConfig, AutoProcessor
for each in (AutoConfig, AutoProcessor):
    print(type(each.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)
"""
    assert run(code, tmp_path) == ["GenieBlueConfig", "GenieBlueProcessor"]


# The two names of a cache


class OldView(torch.nn.Module):
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        return {"owner": self, "past_key_values": past_key_values, "given": (inputs_embeds, kwargs)}

    def forward(self, owner=None, past_key_values=None, **kwargs):
        return past_key_values, kwargs


class NewView(torch.nn.Module):
    def prepare_inputs_for_generation(self, input_ids, cache=None, inputs_embeds=None, **kwargs):
        return {"owner": self, "cache": cache, "given": (inputs_embeds, kwargs)}

    def forward(self, owner=None, cache=None, **kwargs):
        return cache, kwargs


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "deep copy"])
@pytest.mark.parametrize("kind, name, of_generate", [
    (OldView, "past_key_values", "cache"), (NewView, "cache", "past_key_values"),
])  # fmt: skip
def test_view_gets_the_cache_of_generate_under_the_name_it_knows(kind, name, of_generate, copied, monkeypatch):
    monkeypatch.setattr(compat_genieblue, "CACHE", of_generate)
    view = kind()
    adapt_to_cache_of_generate(view)
    view = copy.deepcopy(view) if copied else view
    names = list(inspect.signature(view.prepare_inputs_for_generation).parameters)
    assert names == ["input_ids", of_generate, "inputs_embeds", "kwargs"]  # from which `generate` tells what it takes
    prepared = view.prepare_inputs_for_generation([], inputs_embeds="rows", use_cache=True, **{of_generate: "it"})
    assert prepared == {"owner": view, name: "it", "given": ("rows", {"use_cache": True})}
    assert prepared["owner"] is view
    for given in (name, of_generate):
        assert view(**{given: "it"}, use_cache=True) == ("it", {"use_cache": True})
    assert view(use_cache=True) == (None, {"use_cache": True})


@pytest.mark.parametrize("kind, of_generate", [(OldView, "past_key_values"), (NewView, "cache")])
def test_view_that_knows_the_cache_of_generate_stays_as_it_is(kind, of_generate, monkeypatch):
    monkeypatch.setattr(compat_genieblue, "CACHE", of_generate)
    view = kind()
    before = set(vars(view))
    adapt_to_cache_of_generate(view)
    assert set(vars(view)) == before and not view._forward_pre_hooks
