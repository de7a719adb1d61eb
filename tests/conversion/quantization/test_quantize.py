"""Quantizing: what is written and what is left alone, layers kept at 16 bits, shared bases, calibration."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_genieblue import change_adapter, prompt, tiny_genieblue
from tiny_quantized import (
    ADAPTER,
    BASE_WEIGHTS,
    OWN_WEIGHTS,
    PIXELS,
    REQUEST,
    TEXT,
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
from transformers import AutoModel, AutoTokenizer

from conversion.quantization import rounder as rounder_module
from conversion.quantization.quantize import CalibrationSamples

W8 = {"llm": "w8a16", "rounding": "rtn"}


def settings(folder):
    return json.loads((folder / "config.json").read_text())


# What is written


def test_source_and_its_base_are_only_read(tmp_path):
    source = save_large_pair(tmp_path / "source")
    before = contents(tmp_path / "source")
    for number, mix in enumerate(({}, {"llm": "w16a16"}, {"rounding": "gptq"})):
        quantize(source, tmp_path / str(number), **mix)
    quantize(source, tmp_path / "inner", {"self_contained": True})
    assert contents(tmp_path / "source") == before
    assert leftovers(tmp_path / "source") == ["base-llm", "genieblue"]
    assert leftovers(tmp_path) == ["0", "1", "2", "inner", "source"]
    assert [leftovers(tmp_path / name) for name in ("0", "1", "inner")] == [
        ["base", "genieblue"], ["genieblue"], ["genieblue"]
    ]  # fmt: skip


def test_quantized_base_is_a_whole_repository(tmp_path):
    source, base = large_pair().parent / "base-llm", quantized_pair() / "base"
    before, after = contents(source), contents(base)
    companions = before.keys() - {"config.json", "model.safetensors"}
    assert "tokenizer.json" in companions
    assert all(after[name] == before[name] for name in companions)
    for family in ("bluelm",):
        code = {name for name in contents(large_pair(family).parent / "base-llm") if name.endswith(".py")}
        assert code and code <= contents(quantized_pair(family) / "base").keys()
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert tokenizer("The answer")["input_ids"] == AutoTokenizer.from_pretrained(source)("The answer")["input_ids"]


def test_config_says_what_each_part_is_in():
    recipe = {**W8, "vision_tower": "w4a16", "lm_head": "w8a16", "group_size": 32}
    config = settings(quantized_pair(**recipe) / "genieblue")["quantization"]
    expected = {"llm": "w8a16", "replicated_blocks": "w8a16", "lora": "w8a16", "vision_tower": "w4a16",
                "multi_modal_projector": "w8a16", "lm_head": "w8a16", "embeddings": "w16a16", "rounding": "rtn",
                "group_size": 32, "activations": "bfloat16"}  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    base = settings(quantized_pair(**recipe) / "base")["quantization_config"]
    assert (base["llm"], base["lm_head"], base["rounding"], base["group_size"]) == ("w8a16", "w8a16", "rtn", 32)
    assert "vision_tower" not in base


def test_folders_name_no_path_of_this_computer(tmp_path):
    source = save_large_pair(tmp_path / "private-place" / "source")
    quantize(source, tmp_path / "private-place" / "quantized")
    for name, content in contents(tmp_path / "private-place" / "quantized").items():
        assert str(tmp_path).encode() not in content, name
        assert b"private-place" not in content, name


def test_four_bits_are_smaller_than_eight_than_sixteen():
    def size(folder):
        return (folder / BASE_WEIGHTS).stat().st_size

    plain = (large_pair().parent / "base-llm/model.safetensors").stat().st_size / 2  # stored in float32
    assert size(quantized_pair()) < 0.8 * size(quantized_pair(**W8)) < 0.64 * plain


def test_report_gives_places_and_errors():
    folder = quantized_pair().parent / "reported"
    report = quantize(large_pair(), folder, **W8)
    assert (report.output, report.base) == (folder / "genieblue", str(folder / "base"))
    assert 0 < report.errors["text"] < 0.1 and 0 < report.errors["multimodal"] < 0.1
    assert report.other_precision == settings(folder / "genieblue")["quantization"]["other_precision"]
    four_bits = quantize(large_pair(), folder.with_name("reported-4"), rounding="rtn")
    assert four_bits.errors["text"] > 3 * report.errors["text"]
    shutil.rmtree(folder)


def test_errors_are_those_of_the_model_that_a_user_loads(tmp_path):
    report = quantize(large_pair(), tmp_path, llm="w16a16", lora="w16a16", activations="float32")
    assert report.errors["text"] == 0 < report.errors["multimodal"]
    only_base = quantize(large_pair(), tmp_path / "base", replicated_blocks="w16a16", lora="w16a16",
                         vision_tower="w16a16", multi_modal_projector="w16a16", llm="w8a16")  # fmt: skip
    assert only_base.errors["text"] > 0 and only_base.errors["multimodal"] > 0


def test_quantizing_is_repeatable(tmp_path):
    for mix in ({}, {"rounding": "gptq"}):
        quantize(large_pair(), tmp_path / str(mix), **mix)
        for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS):
            assert (tmp_path / str(mix) / name).read_bytes() == (quantized_pair(**mix) / name).read_bytes()


def test_self_contained_folder_needs_nothing_beside_it(tmp_path):
    quantize(large_pair(), tmp_path, {"self_contained": True})
    shutil.move(tmp_path / "genieblue", tmp_path / "elsewhere")
    model = load(tmp_path / "elsewhere")
    assert same(answers(model), answers(load(quantized_pair() / "genieblue")))
    assert torch.equal(load_base(tmp_path / "elsewhere/base")(TEXT).logits, model(TEXT).logits)
    model.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "elsewhere")
    assert contents(tmp_path / "again/base") == contents(quantized_pair() / "base")
    assert same(answers(load(tmp_path / "again")), answers(model))


def test_source_without_processor_or_card_is_quantized(tmp_path):
    source = save_large_pair(tmp_path / "source")
    for name in ("README.md", "processor_config.json"):
        (source / name).unlink()
    quantize(source, tmp_path / "quantized")
    assert (tmp_path / "quantized/genieblue/processor_config.json").is_file()
    assert (tmp_path / "quantized/genieblue/README.md").is_file() and (tmp_path / "quantized/base/README.md").is_file()


def test_quantized_genieblue_and_base_can_be_moved_together(tmp_path):
    quantize(large_pair(), tmp_path / "here")
    expected = answers(load(tmp_path / "here/genieblue"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert same(answers(load(tmp_path / "there/genieblue")), expected)
    assert same(answers(AutoModel.from_pretrained(tmp_path / "there/genieblue")), expected)


# A base that is quantized already, for a second adapter


def second_genieblue(folder):
    """Another adapter on the base of `large_pair()`."""
    model = load(large_pair())
    change_adapter(model, seed=11, scale=0.05).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mix", [{}, W8, {"lm_head": "w8a16", "embeddings": "w8a16"}], ids=str)
def test_second_adapter_uses_the_same_quantized_base(mix, tmp_path):
    base = shutil.copytree(quantized_pair(**mix) / "base", tmp_path / "base")
    before = contents(base)
    quantize(second_genieblue(tmp_path / "second"), tmp_path / "own", **mix)
    quantize(tmp_path / "second", tmp_path, {"quantized_base": base}, **mix)
    assert contents(base) == before
    assert sorted(leftovers(tmp_path)) == ["base", "genieblue", "own", "second"]
    assert same(answers(load(tmp_path / "genieblue")), answers(load(tmp_path / "own/genieblue")))
    assert same(answers(load(quantized_pair(**mix) / "genieblue", base_model=base))[:1],
                answers(load(tmp_path / "genieblue"))[:1])  # fmt: skip


@pytest.mark.parametrize("asked", [{"llm": "w8a16"}, {"lm_head": "w8a16"}, {"embeddings": "w8a16"},
                                   {"activations": "float16"}, {"group_size": 32}], ids=str)  # fmt: skip
def test_quantized_base_of_another_recipe_is_refused(asked, tmp_path):
    """Otherwise config.json would say what is not so."""
    with pytest.raises(ValueError, match="was requested"):
        quantize(large_pair(), tmp_path, {"quantized_base": quantized_pair() / "base"}, **asked)
    assert leftovers(tmp_path) == []


def test_quantized_base_of_another_base_is_refused(tmp_path):
    source = save_large_pair(tmp_path / "source")
    base = load_base(source.parent / "base-llm")
    with torch.no_grad():
        base.model.norm.weight.mul_(1.25)  # a fine-tune that is near
    base.save_pretrained(source.parent / "base-llm")
    load(source, base_model=base, check_base=False).save_pretrained(tmp_path / "x")
    tuned = change_adapter(tiny_genieblue(base=load_base(source.parent / "base-llm")), scale=0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="is not a quantized copy of this model's base"):
        quantize(tmp_path / "tuned", tmp_path / "out", {"quantized_base": quantized_pair() / "base"})
    assert not (tmp_path / "out/genieblue").exists()


@pytest.mark.parametrize("given", ["unquantized", "genieblue", "empty", "missing"])
def test_what_is_no_quantized_base_is_refused(given, tmp_path):
    (tmp_path / "empty").mkdir()
    given = {"unquantized": large_pair().parent / "base-llm", "genieblue": quantized_pair() / "genieblue",
             "empty": tmp_path / "empty", "missing": tmp_path / "missing"}[given]  # fmt: skip
    with pytest.raises((ValueError, OSError)):
        quantize(large_pair(), tmp_path / "out", {"quantized_base": given})
    assert not (tmp_path / "out").exists() or leftovers(tmp_path / "out") == []


# Layers that kernels cannot take


def test_layers_of_odd_shapes_stay_and_are_listed(tmp_path):
    """An MLP of 40 in 8 or 4 bits would crash the process; 48 fits 8 bits only."""
    source = save_large_pair(tmp_path / "source", intermediate_size=40,
                             tower={"hidden_size": 24, "intermediate_size": 48})  # fmt: skip
    quantize(source, tmp_path / "quantized", vision_tower="w4a16", lm_head="w8a16", embeddings="w8a16")
    kept = settings(tmp_path / "quantized/genieblue")["quantization"]["other_precision"]
    assert kept["model.layers.0.mlp.down_proj"] == "16 bits: in_features 40 is no multiple of 16"
    assert kept["model.layers.0.mlp.gate_proj"].startswith("8 bits instead of 4: out_features 40")
    assert kept["vision_tower.encoder.layers.0.mlp.fc1"].startswith("16 bits: in_features 24")
    assert kept["vision_tower.encoder.layers.0.mlp.fc2"].startswith("8 bits instead of 4: out_features 24")
    assert "16 bits" in kept["vision_tower.embeddings.patch_embedding"]
    assert any("layers.3" in name and "down_proj" in name and "base_model" in name for name in kept)
    base = settings(tmp_path / "quantized/base")["quantization_config"]["other_precision"]
    assert base == {name: reason for name, reason in kept.items() if name.startswith("model.")}
    model = load(tmp_path / "quantized/genieblue")
    assert all(torch.isfinite(part.float()).all() for part in answers(model))
    assert type(model.language_model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    report = quantize(source, tmp_path / "again", vision_tower="w4a16", lm_head="w8a16", embeddings="w8a16")
    assert report.other_precision == kept


@pytest.mark.parametrize("shape", [{"intermediate_size": 588}, {"intermediate_size": 4304},
                                   {"intermediate_size": 24}], ids=str)  # fmt: skip
@pytest.mark.parametrize("llm", ["w4a16", "w8a16"])
def test_sizes_that_crashed_run(llm, shape, tmp_path):
    source = save_large_pair(tmp_path / "source", tower={"intermediate_size": 588}, **shape)
    quantize(source, tmp_path / "quantized", llm=llm, rounding="rtn", vision_tower=llm)
    found, plain = answers(load(tmp_path / "quantized/genieblue")), answers(load(source, dtype=torch.bfloat16))
    for one, other in zip(found[:3], plain[:3], strict=True):
        assert (one - other).float().norm() < 0.8 * other.float().norm()


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_lora_of_any_rank(rank, tmp_path):
    source = save_large_pair(tmp_path / "source", lora_rank=rank)
    quantize(source, tmp_path / "quantized", llm="w16a16", replicated_blocks="w16a16", vision_tower="w16a16",
             multi_modal_projector="w16a16")  # fmt: skip
    found, plain = (load(path)(REQUEST, pixel_values=PIXELS).logits
                    for path in (tmp_path / "quantized/genieblue", source))  # fmt: skip
    assert 0 < (found - plain).norm() < 0.1 * plain.norm()


def test_vocabulary_of_an_odd_size(tmp_path):
    source = save_large_pair(tmp_path / "source", vocab_size=131)
    quantize(source, tmp_path / "quantized", lm_head="w8a16", embeddings="w8a16")
    model = load(tmp_path / "quantized/genieblue")
    assert model(TEXT).logits.shape == (1, 9, 131)
    assert torch.equal(load_base(tmp_path / "quantized/base")(TEXT).logits, model(TEXT).logits)


def test_tied_head_and_embedding_are_quantized_together_or_not_at_all(tmp_path):
    for mix in ({"lm_head": "w8a16"}, {"embeddings": "w8a16"}):
        with pytest.raises(ValueError, match="share one weight"):
            quantize(large_pair("llama-tied"), tmp_path, **mix)
        assert leftovers(tmp_path) == []
    folder = quantized_pair("llama-tied", lm_head="w8a16", embeddings="w8a16")
    names = {name for name in load_file(folder / BASE_WEIGHTS) if "lm_head" in name or "embed_tokens" in name}
    assert len(names) == 4  # codes, scales and quanto's two scales of activations, once
    base = load_base(folder / "base")
    assert base.lm_head.weight is base.model.embed_tokens.weight


# Calibration


@torch.no_grad()
def output_error(folder, samples):
    """Mean relative error of the base's logits on calibration texts."""
    model, plain = load_base(folder / "base"), load_base(large_pair().parent / "base-llm", dtype=torch.bfloat16)
    errors = []
    for ids in samples.text:
        exact = plain(ids).logits.float()
        errors.append(float((model(ids).logits.float() - exact).norm() / exact.norm()))
    return sum(errors) / len(errors)


def test_gptq_lowers_the_error_on_its_samples():
    samples = calibration_samples()
    errors = {name: output_error(quantized_pair(**mix), samples)
              for name, mix in {"rtn": {"rounding": "rtn"}, "gptq": {"rounding": "gptq"}}.items()}  # fmt: skip
    assert errors["gptq"] < 0.9 * errors["rtn"]


def changed(one, other, name, part):
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    return {key for key in first if part in key and not torch.equal(first[key], second[key])}


def test_text_reaches_the_base_and_images_what_genieblue_adds(tmp_path):
    """Which is seen from whose codes change with whose samples."""
    some = calibration_samples()
    first = quantized_pair(rounding="gptq", llm="w8a16")
    others = {
        "text": CalibrationSamples(text=[prompt(24, seed=seed) for seed in (40, 41)], multimodal=some.multimodal),
        "images": CalibrationSamples(text=some.text, multimodal=calibration_samples(2).multimodal[1:]),
    }
    for name, samples in others.items():
        quantize(large_pair(), tmp_path / name, {"samples": samples}, rounding="gptq", llm="w8a16")
    assert changed(first, tmp_path / "text", BASE_WEIGHTS, "._data")
    assert not changed(first, tmp_path / "images", BASE_WEIGHTS, "")
    assert changed(first, tmp_path / "images", OWN_WEIGHTS, "vision_tower.encoder.layers")
    assert changed(first, tmp_path / "images", OWN_WEIGHTS, "multi_modal_projector")
    assert changed(first, tmp_path / "images", ADAPTER, "mlp.up_proj.weight._data")
    assert not changed(first, tmp_path / "text", OWN_WEIGHTS, "")
    assert not changed(first, tmp_path / "images", ADAPTER, ".lora_")


def test_gptq_with_text_alone_rounds_copies_on_it(tmp_path, caplog):
    samples = CalibrationSamples(text=calibration_samples().text)
    quantize(large_pair(), tmp_path, {"samples": samples}, rounding="gptq")
    assert "no image" in caplog.text
    assert "vision_tower (rtn: " in caplog.text and "multi_modal_projector (rtn: " in caplog.text
    assert "llm (" not in caplog.text and "replicated_blocks (" not in caplog.text
    assert changed(tmp_path, quantized_pair(rounding="gptq"), ADAPTER, "._data")
    assert changed(tmp_path, quantized_pair(rounding="gptq"), BASE_WEIGHTS, "._data")  # weighed by both views


def test_config_says_which_parts_were_rounded_by_another_method(tmp_path, caplog):
    samples = CalibrationSamples(text=calibration_samples().text)
    quantize(large_pair(), tmp_path, {"samples": samples}, rounding="gptq", vision_tower="w4a16", lm_head="w8a16")
    recorded = settings(tmp_path / "genieblue")["quantization"]
    count = len(json.loads((tmp_path / "genieblue/language_adapter/quanto_qmap.json").read_text()))
    assert recorded["rounding"] == "gptq"
    other = recorded["other_rounding"]
    assert other.keys() == {"vision_tower", "vision_tower.head", "multi_modal_projector", "lora", "lm_head"}
    assert other["multi_modal_projector"] == "rtn: 2 of 2 layers" and other["lm_head"] == "rtn: 1 of 1 layers"
    assert other["vision_tower"] == "mse: 12 of 12 layers" and int(other["lora"].split()[1]) < count
    base = settings(tmp_path / "base")["quantization_config"]
    assert (base["rounding"], base["other_rounding"]) == ("gptq", {"lm_head": "rtn: 1 of 1 layers"})
    assert "lm_head (" not in caplog.text
    assert load(tmp_path / "genieblue").config.quantization == recorded
    for name in ("genieblue", "base"):
        assert "`lm_head` rtn: 1 of 1 layers" in (tmp_path / name / "README.md").read_text()


def test_linear_that_no_sample_reached_is_named(tmp_path, monkeypatch, caplog):
    walk = rounder_module.walk_blocks

    def walk_without_one(view, batches, path, process, **options):
        def lacking(index, block, hessians):
            process(index, block, {name: found for name, found in hessians.items() if "down_proj" not in name})

        return walk(view, batches, path, lacking, **options)

    monkeypatch.setattr(rounder_module, "walk_blocks", walk_without_one)
    quantize(large_pair(), tmp_path, rounding="gptq")
    assert "llm (mse: 4 of 28 layers)" in caplog.text and "vision_tower (" not in caplog.text
    assert settings(tmp_path / "base")["quantization_config"]["other_rounding"] == {"llm": "mse: 4 of 28 layers"}


def test_an_inner_base_goes_when_its_model_is_replaced_by_one_without(tmp_path):
    quantize(large_pair(), tmp_path, {"self_contained": True})
    assert (tmp_path / "genieblue/base/quantized_model.safetensors").is_file()
    (tmp_path / "genieblue/notes.txt").write_text("mine")
    quantize(large_pair(), tmp_path, {"overwrite": True})
    assert not (tmp_path / "genieblue/base").exists() and (tmp_path / "genieblue/notes.txt").is_file()
    assert load(tmp_path / "genieblue").config.base_model_name_or_path == str(tmp_path / "base")


def test_rounding_of_a_base_that_was_there_is_recorded(tmp_path, caplog):
    base = quantized_pair(rounding="mse") / "base"
    quantize(large_pair(), tmp_path, {"quantized_base": base}, rounding="gptq")
    other = settings(tmp_path / "genieblue")["quantization"]["other_rounding"]
    assert other["llm"] == "mse, as the base was rounded before"
    assert "replicated_blocks" not in other and "reached" not in caplog.text


def test_what_comes_later_is_calibrated_behind_what_is_rounded_already(tmp_path):
    """The copied block reads what the rounded base puts out, so its codes depend on the base's precision."""
    for llm in ("w4a16", "w8a16"):
        quantize(large_pair(), tmp_path / llm, rounding="gptq", llm=llm, replicated_blocks="w8a16")
    assert changed(tmp_path / "w4a16", tmp_path / "w8a16", ADAPTER, "._data")
    assert not changed(tmp_path / "w4a16", tmp_path / "w8a16", OWN_WEIGHTS, "")


def test_samples_are_left_alone_by_other_methods(tmp_path):
    quantize(large_pair(), tmp_path, {"samples": calibration_samples()}, rounding="rtn")
    for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS):
        assert (tmp_path / name).read_bytes() == (quantized_pair(rounding="rtn") / name).read_bytes()


def test_progress_is_shown_for_each_part(tmp_path):
    titles = []

    def progress(steps, title):
        titles.append((title, len(list(steps))))
        return range(titles[-1][1])

    quantize(large_pair(), tmp_path, {"progress": progress}, rounding="gptq")
    assert titles == [("vision tower", 2), ("language model", 4), ("replicated blocks", 4)]
