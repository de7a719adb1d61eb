"""Folders run by themselves: loaded, used and saved by processes that do not have this package."""

import os
import sys
from pathlib import Path

import pytest
from clean_process import ask, run_clean
from safetensors.torch import load_file
from tiny_genieblue import change_adapter, save_tiny_pair
from tiny_models import REMOTE_CODE_FAMILIES
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from modeling_genieblue import GenieBlueForConditionalGeneration

ADAPTER = "language_adapter/adapter_model.safetensors"


@pytest.fixture
def env(tmp_path):
    """Environment of a clean process, with a module cache of its own."""
    return {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("family", ["llama", "bluelm"])
def test_folder_loads_through_the_auto_classes(family, tmp_path, elsewhere, env):
    folder = save_tiny_pair(tmp_path, family)
    code = f"""
    from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText,
                              AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer)
    folder, refusals = {str(folder)!r}, []
    for refused in (lambda: __import__("modeling_genieblue"), lambda: __import__("hub_cards"),
                    lambda: AutoModel.from_pretrained(folder, trust_remote_code=False)):
        try:
            refused()
        except (ModuleNotFoundError, ValueError) as error:
            refusals.append(str(error))
    classes = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    models = [each.from_pretrained(folder, trust_remote_code=True) for each in classes]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [type(each).__name__ for each in (*models, config, processor, image_processor)]
    modules = {{type(each).__module__.split(".")[0] for each in (models[0], config, processor, image_processor)}}
    from PIL import Image
    inputs = processor(text="What is this? <image>", images=Image.new("RGB", (50, 30)), return_tensors="pt")
    ids = models[0].generate(**inputs, max_new_tokens=3, do_sample=False)
    text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:])
    answers = [ask(each) for each in models]
    answer([names, sorted(modules), answers[0] == answers[1] == answers[2], answers[0], len(text), refusals])
    """
    names, modules, equal, answers, texts, refusals = run_clean(code, elsewhere, env)
    assert len(refusals) == 3 and "trust_remote_code" in refusals[-1]
    assert texts == 1
    model = "GenieBlueForConditionalGeneration"
    assert names == [model, model, model, "GenieBlueConfig", "GenieBlueProcessor", "GenieBlueImageProcessor"]
    assert modules == ["transformers_modules"]
    assert equal
    trust = {"trust_remote_code": family in REMOTE_CODE_FAMILIES}
    assert answers == ask(GenieBlueForConditionalGeneration.from_pretrained(folder, **trust))


def test_remote_code_saves_folders_that_load_again(tmp_path, elsewhere, env):
    folder = save_tiny_pair(tmp_path)
    code = f"""
    from transformers import AutoModel
    def load(folder, **kwargs):
        return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)
    model = load({str(folder)!r})
    model.save_pretrained("again")
    load("again").save_pretrained("third")
    load("again").save_pretrained("again")
    model.save_pretrained("half", dtype=torch.bfloat16)
    others = [ask(load(folder, dtype="float32")) for folder in ("again", "third")]
    answer([ask(model), others, str(load("half").language_model.dtype)])
    """
    expected, others, dtype = run_clean(code, elsewhere, env)
    assert others == [expected, expected]
    assert dtype == "torch.float32"  # the base's
    code_files = {path.name for path in folder.glob("*.py")}
    for name in ("again", "third", "half"):
        assert {path.name for path in (elsewhere / name).glob("*.py")} == code_files
        for file in code_files:
            assert (elsewhere / name / file).read_bytes() == (folder / file).read_bytes()
        assert load_file(elsewhere / name / ADAPTER).keys() == load_file(folder / ADAPTER).keys()
        assert (elsewhere / name / "processor_config.json").is_file()
        assert not (elsewhere / name / "adapter_config.json").exists()
    # The package loads what remote code saved.
    assert ask(GenieBlueForConditionalGeneration.from_pretrained(elsewhere / "third")) == expected


def test_remote_code_puts_itself_onto_a_given_base_and_trains(tmp_path, elsewhere, env):
    folder = save_tiny_pair(tmp_path)
    code = f"""
    from transformers import AutoModel, AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True, base_model=base)
    before = ask(model)
    assert model.language_model is base
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(20, 29)[None]
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval().save_pretrained("trained")
    after = ask(model)
    answer([before, after, ask(AutoModel.from_pretrained("trained", trust_remote_code=True))])
    """
    before, after, loaded = run_clean(code, elsewhere, env)
    assert before[0] == after[0] and before[1] != after[1]
    assert loaded == after


def test_two_folders_with_different_code_load_side_by_side(tmp_path, elsewhere, env):
    """As two revisions of a model do."""
    folder = save_tiny_pair(tmp_path)
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    change_adapter(model).save_pretrained(tmp_path / "other")
    code_file = tmp_path / "other" / "modeling_genieblue.py"
    code_file.write_text(code_file.read_text() + "\nEDITION = 2\n")
    code = f"""
    import sys
    from transformers import AutoModel
    first = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
    second = AutoModel.from_pretrained({str(tmp_path / "other")!r}, trust_remote_code=True)
    editions = [getattr(sys.modules[type(each).__module__], "EDITION", 1) for each in (first, second)]
    answer([editions, ask(first), ask(second)])
    """
    editions, first, second = run_clean(code, elsewhere, env)
    assert editions == [1, 2]
    assert second == ask(model)
    assert first != second


def test_code_files_need_nothing_but_the_stated_libraries():
    """Every absolute import counts as a requirement of the repo when transformers loads its code."""
    allowed = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "PIL"}
    paths = sorted((Path(__file__).parents[2] / "modeling_genieblue").glob("*_genieblue.py"))
    names = {path.stem for path in paths}
    for path in paths:
        assert set(get_imports(path)) <= allowed | sys.stdlib_module_names, path.name
        assert set(get_relative_imports(path)) <= names, path.name
