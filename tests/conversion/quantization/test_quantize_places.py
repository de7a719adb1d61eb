"""Where quantizing writes and what it uses again: shared bases, killed runs, places and options that cannot be."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from command_line import REPOSITORY
from tiny_models import FAMILIES
from tiny_quantized import (
    answers,
    calibration_samples,
    contents,
    large_pair,
    leftovers,
    load,
    load_base,
    quantize,
    quantized_pair,
    same,
    save_large_pair,
)
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conversion.quantization import parts as parts_module
from conversion.quantization import quantize as quantize_module
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import quantize_genieblue
from conversion.staging import explained_full_disk
from conversion.verification.saved_model import SavedModel
from conversion.verification.verify_quantized import check_quantization
from genieblue.cli.app import app
from hub_cards.publish_base import find_base_problems
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.staging_genieblue import NewFolder, StagingFolder

W8 = {"llm": "w8a16", "rounding": "rtn"}
LEFT_AT_16_BITS = {"llm": "w16a16", "replicated_blocks": "w8a16"}


@pytest.fixture
def must_not_load(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("The model was loaded before the request was refused.")

    quantized_pair(), quantized_pair(**W8)  # made while they still can be
    monkeypatch.setattr(quantize_module.GenieBlueForConditionalGeneration, "from_pretrained", refuse)


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """A GenieBlue on a base with the same embeddings and norms as `large_pair`'s, and other matrices."""
    folder = tmp_path_factory.mktemp("fine-tune")
    shutil.copytree(large_pair().parent / "base-llm", folder / "base-llm")
    base = AutoModelForCausalLM.from_pretrained(folder / "base-llm")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.mul_(1 + 0.3 * torch.randn_like(weight))
    base.save_pretrained(folder / "base-llm")
    tower = load(large_pair()).vision_tower
    base = AutoModelForCausalLM.from_pretrained(folder / "base-llm")
    GenieBlueForConditionalGeneration.from_base(base, tower, lora_rank=4).save_pretrained(folder / "genieblue")
    return folder / "genieblue"


# A base that is used again


@pytest.mark.parametrize("mix", [{}, W8], ids=str)
def test_quantized_base_of_a_fine_tune_is_refused_by_its_fingerprint(mix, fine_tune, tmp_path, must_not_load):
    recorded = json.loads((quantized_pair(**mix) / "base/config.json").read_text())["quantization_config"]["source"]
    source = json.loads((large_pair() / "config.json").read_text())["base_model_fingerprint"]
    assert recorded["fingerprint"] == source
    with pytest.raises(ValueError, match="not a quantized copy of this model's base.*sha256"):
        quantize(fine_tune, tmp_path, {"quantized_base": quantized_pair(**mix) / "base"}, **mix)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "mix", [{}, {"rounding": "rtn"}, {"rounding": "gptq"}, W8, {**W8, "rounding": "gptq"}], ids=str
)
def test_quantized_base_without_a_fingerprint_is_known_by_its_values(mix, fine_tune, tmp_path):
    base = shutil.copytree(quantized_pair(**mix) / "base", tmp_path / "shared")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]["source"]["fingerprint"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a quantized copy of this model's base.*differs by"):
        quantize(fine_tune, tmp_path, {"quantized_base": base}, **mix)
    quantize(large_pair(), tmp_path, {"quantized_base": base}, **mix)
    assert same(answers(load(tmp_path / "genieblue"))[:1], answers(load(quantized_pair(**mix) / "genieblue"))[:1])


@pytest.mark.parametrize("given", ["/nowhere/at-all", "./nowhere", "nowhere", "W8"])
def test_unfit_quantized_base_is_refused_before_the_model_is_loaded(given, tmp_path, must_not_load):
    base = quantized_pair(**W8) / "base" if given == "W8" else given
    with pytest.raises((OSError, ValueError), match="was requested" if given == "W8" else "no quantized base in"):
        quantize(large_pair(), tmp_path, {"quantized_base": base})
    assert leftovers(tmp_path) == []


# A base that others run on


def test_shared_base_is_only_replaced_when_it_was_named(tmp_path, must_not_load):
    shutil.copytree(quantized_pair() / "base", tmp_path / "base-llm-w4a16")
    before = contents(tmp_path)
    for overwrite in (True, False):
        with pytest.raises(OSError, match=r"already exists.*--quantized-base .*--base-out.*no longer load"):
            quantize_genieblue(large_pair(), tmp_path / "new", overwrite=overwrite)
    # A GenieBlue that is replaced, on another base, allows it no more than a new one.
    shutil.copytree(quantized_pair(**W8), tmp_path, dirs_exist_ok=True)
    with pytest.raises(OSError, match="--quantized-base"):
        quantize_genieblue(large_pair(), tmp_path / "genieblue", overwrite=True)
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before


def test_base_of_the_genieblue_that_is_replaced_is_replaced_too(tmp_path):
    for rounding in ("mse", "rtn"):
        quantize_genieblue(large_pair(), tmp_path / "q", QuantizationRecipe(rounding=rounding), overwrite=True)
    assert leftovers(tmp_path) == ["base-llm-w4a16", "q"]
    assert same(answers(load(tmp_path / "q")), answers(load(quantized_pair(rounding="rtn") / "genieblue")))


# Options and places without a meaning


@pytest.mark.parametrize("options", [{"base_output": "b"}, {"quantized_base": "b"}, {"self_contained": True}], ids=str)
def test_places_of_a_base_that_stays_as_it_is_are_refused(options, tmp_path, must_not_load):
    with pytest.raises(ValueError, match="base stays at 16 bits"):
        quantize(large_pair(), tmp_path, options, **LEFT_AT_16_BITS)


@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_samples_longer_than_the_base_can_take_are_refused(kind, tmp_path, must_not_load):
    samples = calibration_samples(1)
    ids = torch.ones(1, 1025, dtype=torch.long)
    getattr(samples, kind).append(ids if kind == "text" else {"input_ids": ids})
    with pytest.raises(ValueError, match="1025 tokens, but the base supports only 1024.*--sample-length"):
        quantize(large_pair(), tmp_path, {"samples": samples}, rounding="gptq")


def test_image_folder_without_chats_is_refused(tmp_path, must_not_load):
    (tmp_path / "text.txt").write_text("some text")
    for calibration in ([], ["--calibration", str(tmp_path / "text.txt")]):
        arguments = ["quantize", str(large_pair()), "--out", str(tmp_path / "q"), "--image-folder", str(tmp_path)]
        result = CliRunner().invoke(app, [*arguments, *calibration])
        assert result.exit_code == 2 and "images of chats" in result.output


def test_places_that_cannot_be_are_named(tmp_path, must_not_load):
    (tmp_path / "file").write_text("mine")
    for places, message in (
        ({"output": "/"}, "root"), ({"output": "/", "overwrite": True}, "root"),
        ({"output": tmp_path / "file/x"}, "file is a file, so"),
        ({"output": tmp_path / "q", "base_output": tmp_path / "file/a/b"}, "file is a file, so"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            quantize_genieblue(large_pair(), **places)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="has no config.json"):
        quantize_genieblue(tmp_path / "empty", tmp_path / "q")


def test_full_disk_names_the_folders_and_a_way_out(tmp_path):
    safetensors_words = OSError("I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "No space left on device"), safetensors_words):
        with pytest.raises(OSError, match="No space left.*writing .*out and .*base: free some"):
            with explained_full_disk(tmp_path / "out", tmp_path / "base"):
                raise error
    with pytest.raises(OSError, match="^busy$"), explained_full_disk(tmp_path):
        raise OSError("busy")


# Killed runs

KILLED = """
import os, sys
from pathlib import Path

from modeling_genieblue.staging_genieblue import NewFolder, StagingFolder
target = Path(sys.argv[1])
with StagingFolder(target, "quantizing") as folder, NewFolder(target) as new:
    (folder / "half").write_text("half")
    if sys.argv[2] == "after":
        new.put_in_place()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_killed_run_left_is_removed_and_what_is_in_use_or_the_users_stays(when, tmp_path, caplog):
    target = tmp_path / "q"
    (target / "inner").mkdir(parents=True)
    with StagingFolder(target, "quantizing") as mine:
        assert subprocess.run([sys.executable, "-c", KILLED, str(target), when]).returncode == -signal.SIGKILL
        assert len(leftovers(tmp_path)) == 4
        with StagingFolder(target, "quantizing") as other, NewFolder(target):
            assert mine.is_dir() and other.is_dir()
        assert mine.is_dir() and not other.exists()
    if when == "before":
        assert leftovers(tmp_path) == ["q"]
    else:  # the old folder was in it
        kept = next(tmp_path.glob(".q.writing-*/q.old"))
        assert (kept / "inner").is_dir() and str(kept) in caplog.text


KILLED_QUANTIZE = """
import os, sys

from conversion.quantization import parts
from genieblue.cli.app import app
from modeling_genieblue.staging_genieblue import NewFolder

def kill(*_arguments, **_options):
    os.kill(os.getpid(), 9)

if sys.argv[1] == "rounding":
    parts._round_adapter = kill
else:  # its base is in its place, and it is not
    put_in_place = NewFolder.put_in_place

    def place(self, *options):
        put_in_place(self, *options)
        if self.target.name == "base":
            kill()

    NewFolder.put_in_place = place
app(sys.argv[2:])
"""


@pytest.mark.parametrize("when", ["rounding", "between"])
def test_a_killed_quantize_leaves_nothing_half_and_the_next_one_goes_on(when, tmp_path):
    command = ["quantize", str(large_pair()), "--out", str(tmp_path / "q"), "--base-out", str(tmp_path / "base"),
               "--llm", "w8a16"]  # fmt: skip
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_QUANTIZE, when, *command], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seen = [name for name in leftovers(tmp_path) if not name.startswith(".")]
    assert seen == ([] if when == "rounding" else ["base"]) and len(leftovers(tmp_path)) > len(seen)
    if seen:  # whole, and to be used
        assert find_base_problems(tmp_path / "base") == []
        load_base(tmp_path / "base")
    result = CliRunner().invoke(app, [*command, *(["--overwrite"] if seen else [])])
    assert result.exit_code == 0, result.output
    assert leftovers(tmp_path) == ["base", "q"]
    assert same(answers(load(tmp_path / "q")), answers(load(quantized_pair(llm="w8a16") / "genieblue")))


@pytest.fixture
def heeds_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores them
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_never_parts_a_genieblue_from_its_base(heeds_interrupts, tmp_path, monkeypatch):
    quantize(large_pair(), tmp_path, llm="w8a16", rounding="rtn")
    remove = NewFolder.remove

    def interrupt(self):
        if self.target == tmp_path / "genieblue":  # the new one is in its place
            signal.raise_signal(signal.SIGINT)
        remove(self)

    monkeypatch.setattr(NewFolder, "remove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(large_pair(), tmp_path, {"overwrite": True}, rounding="rtn")
    monkeypatch.undo()
    assert leftovers(tmp_path) == ["base", "genieblue"]
    assert same(answers(load(tmp_path / "genieblue")), answers(load(quantized_pair(rounding="rtn") / "genieblue")))


def test_the_removal_of_a_replaced_folder_that_is_killed_leaves_nothing_to_move_back(tmp_path, monkeypatch, caplog):
    (tmp_path / "q").mkdir()
    (tmp_path / "q/old").write_text("old")
    with NewFolder(tmp_path / "q") as new:
        new.put_in_place()
        monkeypatch.setattr(NewFolder, "remove", lambda self: os.close(self._lock))
    monkeypatch.undo()
    assert len(leftovers(tmp_path)) == 2
    with NewFolder(tmp_path / "q"):
        pass
    assert leftovers(tmp_path) == ["q"] and "move it back" not in caplog.text


def test_command_that_is_ended_leaves_nothing(tmp_path, monkeypatch):
    def end(*_args, **_kwargs):
        assert leftovers(tmp_path) != []
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(parts_module, "_round_adapter", end)
    result = CliRunner().invoke(app, ["quantize", str(large_pair()), "--out", str(tmp_path / "q")])
    assert result.exit_code == 128 + signal.SIGTERM
    assert leftovers(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is before


# Mixtures of experts


def test_experts_that_stay_at_16_bits_are_listed(tmp_path, monkeypatch):
    mixture = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    monkeypatch.setitem(FAMILIES, "mixture", ("qwen3_moe", mixture))
    report = quantize(save_large_pair(tmp_path / "source", "mixture"), tmp_path)
    for place in ("model.layers.0.mlp.experts", "base_model.model.model.layers.3.mlp.experts"):
        assert (
            report.other_precision[f"{place}.gate_up_proj"]
            == "16 bits: a parameter of 4 x 64 x 64, not in a plain linear layer"
        )
    of_base = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]["other_precision"]
    assert of_base["model.layers.1.mlp.experts.down_proj"].startswith("16 bits")
    assert not [name for name in report.other_precision if "norm" in name or "self_attn" in name]
    check_quantization(SavedModel(str(tmp_path / "genieblue"), None, None, {}, False, "auto", None))
