"""The files of a model: found, read and told from Hub ids by one owner, without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_genieblue.model_files_genieblue import (
    ModelFiles,
    check_folder_or_id,
    file_sha256,
    is_hub_id,
    is_path,
    weight_files,
    with_siblings,
)

ROOT = Path(__file__).parents[2]


def test_what_looks_at_folders_needs_no_torch():
    code = (
        "import sys, hub_cards.publish, hub_cards.model_parts, hub_cards.quantized_base_card\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])\n"
        "from modeling_genieblue import GenieBlueConfig\n"
        "from transformers import AutoModel\n"
        "print(GenieBlueConfig in AutoModel._model_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr


@pytest.mark.parametrize("name, expected", [
    ("gpt2", False), ("org/base", False), ("../base", True), (".", True), ("~/base", True), ("/models/base", True),
    ("models/of/mine", True), (Path("/models"), True),
])  # fmt: skip
def test_paths_are_told_from_hub_ids_by_how_they_are_written(name, expected):
    assert is_path(name) == expected


def test_an_existing_folder_is_no_hub_id(tmp_path):
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert not is_hub_id("org/base", tmp_path) and is_hub_id("org/other", tmp_path)
    assert not is_hub_id(None) and not is_hub_id("not an id")


def test_a_path_to_nothing_is_named():
    with pytest.raises(FileNotFoundError, match="The base /no/such/place is not a folder"):
        check_folder_or_id("/no/such/place", "The base ")
    check_folder_or_id("org/base")


def test_weights_are_the_single_file_before_the_shards_of_an_index(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    find = ModelFiles(tmp_path).find
    with pytest.raises(FileNotFoundError, match="names model-00001-of-00002.safetensors, which is not there"):
        weight_files(find)
    for name in index["weight_map"].values():
        (tmp_path / name).touch()
    assert list(weight_files(find)) == list(index["weight_map"].values())
    (tmp_path / "model.safetensors").touch()
    assert list(weight_files(find)) == ["model.safetensors"]
    assert weight_files(ModelFiles(os.fspath(ROOT)).find) == {}


def test_a_file_of_the_cache_is_known_by_its_name(hub, tmp_path):
    hub.commit("you/base", {"model.safetensors": os.urandom(2_000)})
    path = ModelFiles("you/base").find("model.safetensors")
    assert ModelFiles("you/base").cached("model.safetensors") == path
    assert ModelFiles("you/base").find("no-such-file") is None
    assert file_sha256(path) == Path(os.path.realpath(path)).name


def test_siblings_are_those_that_a_file_imports_now(tmp_path):
    (tmp_path / "a.py").write_text("import json\nfrom .b import x\n")
    (tmp_path / "b.py").write_text("from .gone.deeper import y\n")
    assert with_siblings(tmp_path, ["a.py"]) == ["a.py", "b.py", "gone.py"]
    (tmp_path / "a.py").write_text("import json\nfrom .c import x\n")  # of the same length
    assert with_siblings(tmp_path, ["a.py"]) == ["a.py", "c.py"]
    for name in ("a.py", "c.py"):  # the same bytes, which are wrong in two places
        (tmp_path / name).write_text("def broken(:\n")
        with pytest.raises(SyntaxError) as error:
            with_siblings(tmp_path, [name])
        assert error.value.filename == str(tmp_path / name)
