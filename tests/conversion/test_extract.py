"""A GenieBlue of a VLM and its base, made without training."""

import json
import shutil

import pytest
import torch
from clean_process import run_clean
from PIL import Image
from tiny_vlms import assert_answers_as_the_vlm, before_the_head, save_tiny_vlm_pair
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    QuantoConfig,
)

from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from conversion.llamacpp.export import export_llamacpp
from conversion.lora_form import export_lora
from conversion.qnn.export import export_bundle
from conversion.verification.verify import verify_model
from hub_cards.model_parts import model_info
from hub_cards.publish import files_to_publish, find_problems, publish_folder
from modeling_genieblue import GenieBlueForConditionalGeneration, VlmGenieBlueProcessor

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
IMAGE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_vlm_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def extracted(pair):
    return extract_genieblue(*pair, pair[0].parent / "mine", Choice(copies=2, rank=8))


def _inputs(processor):
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    return processor(text=text, images=IMAGE, return_tensors="pt", add_special_tokens=False)  # the text has its start


@torch.no_grad()
def test_an_extraction_of_all_blocks_answers_as_the_vlm_does(pair, tmp_path):
    extract_genieblue(*pair, tmp_path / "mine", Choice(copies=4))
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    inputs = _inputs(VlmGenieBlueProcessor.from_pretrained(tmp_path / "mine"))
    own = AutoModelForImageTextToText.from_pretrained(pair[0])
    assert torch.equal(inputs["input_ids"], _inputs(AutoProcessor.from_pretrained(pair[0]))["input_ids"])
    expected = before_the_head(own, own.get_output_embeddings(), inputs)
    assert_answers_as_the_vlm(model, model.vlm.get_output_embeddings(), expected, inputs)


@torch.no_grad()
def test_a_pushed_extraction_answers_by_name_in_a_clean_process_as_the_vlm_does(hub, tmp_path):
    vlm, base = save_tiny_vlm_pair(tmp_path)
    hub.commit_folder("maker/base", base)
    hub.commit_folder("maker/vlm", vlm)
    result = extract_genieblue("maker/vlm", "maker/base", tmp_path / "mine", Choice(copies=4))
    publish_folder(result.output, "you/mine")
    IMAGE.save(tmp_path / "image.png")
    ours = run_clean(
        f"""
        from PIL import Image
        from transformers import AutoModel, AutoProcessor
        model = AutoModel.from_pretrained("you/mine", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("you/mine", trust_remote_code=True)
        text = processor.apply_chat_template({MESSAGES!r}, add_generation_prompt=True)
        inputs = processor(text=text, images=Image.open({str(tmp_path / "image.png")!r}), return_tensors="pt")
        with torch.no_grad():
            answer(model(**inputs).logits.double().tolist())
        """,
        tmp_path,
        hub.env(),
    )
    expected = AutoModelForImageTextToText.from_pretrained(vlm)(**_inputs(AutoProcessor.from_pretrained(vlm))).logits
    torch.testing.assert_close(torch.tensor(ours).float(), expected, rtol=1e-5, atol=1e-5)  # as in `tiny_vlms`


@torch.no_grad()
def test_text_of_an_extraction_is_the_bases(pair, extracted):
    model = GenieBlueForConditionalGeneration.from_pretrained(extracted.output)
    processor = VlmGenieBlueProcessor.from_pretrained(extracted.output)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(pair[1]), AutoTokenizer.from_pretrained(pair[1])
    chat = [{"role": "user", "content": "What does the sign say?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ours, plain = (each.apply_chat_template(chat, **options) for each in (processor, tokenizer))
    assert torch.equal(ours["input_ids"], plain["input_ids"])
    assert torch.equal(model(**ours).logits, base(**plain).logits)


def test_a_rendered_chat_has_one_start_as_the_vlm_reads_it(extracted):
    processor = VlmGenieBlueProcessor.from_pretrained(extracted.output)
    own, text = processor.vlm_processor, processor.apply_chat_template(MESSAGES)
    assert text.startswith(own.tokenizer.bos_token)
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, *MESSAGES[0]["content"][1:]]}]
    expected = own.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    assert torch.equal(processor(text=[text], images=[IMAGE], return_tensors="pt")["input_ids"], expected)


def test_options_of_the_processor_reach_both_tokenizers(extracted):
    processor = VlmGenieBlueProcessor.from_pretrained(extracted.output.parent, subfolder="mine", padding_side="right")
    assert processor.tokenizer.padding_side == processor.vlm_processor.tokenizer.padding_side == "right"
    with pytest.raises(ValueError, match="leave the video out"):
        processor(text="What?", videos=[IMAGE])


def test_a_calibrated_extraction_is_nearer_to_the_vlm_on_its_chats(pair, tmp_path):
    chats = [([MESSAGES[0], {"role": "assistant", "content": "the answer"}], [IMAGE])] * 2
    choice = Choice(copies=0, rank=4)
    plain, calibrated = (
        extract_genieblue(*pair, tmp_path / name, choice, calibration=given)
        for name, given in (("plain", None), ("calibrated", chats))
    )
    inputs = _inputs(VlmGenieBlueProcessor.from_pretrained(plain.output))
    expected = AutoModelForImageTextToText.from_pretrained(pair[0])(**inputs).logits
    errors = [
        (GenieBlueForConditionalGeneration.from_pretrained(each.output)(**inputs).logits - expected).norm()
        for each in (plain, calibrated)
    ]
    assert errors[1] < errors[0]
    assert "calibration chats" in calibrated.measurements[0].how


def test_an_extraction_records_what_it_kept(extracted):
    facts = json.loads((extracted.output / "extraction.json").read_text())
    assert facts["plan"]["copied"] == extracted.plan.copied == [1, 3]
    assert (extracted.output / "extraction.png").stat().st_size > 1000
    assert "A VLM of type `llava`" in (extracted.output / "README.md").read_text().replace("a VLM", "A VLM")
    assert model_info(extracted.output).parts["vlm"].parameters > 0


@torch.no_grad()
def test_an_extraction_runs_on_a_base_that_is_quantized_as_it_is_loaded(pair, extracted):
    quantization = {"quantization_config": QuantoConfig(weights="int8")}
    model = GenieBlueForConditionalGeneration.from_pretrained(extracted.output, **quantization)
    exact = GenieBlueForConditionalGeneration.from_pretrained(extracted.output)
    base = AutoModelForCausalLM.from_pretrained(pair[1], **quantization)
    inputs, text = _inputs(VlmGenieBlueProcessor.from_pretrained(extracted.output)), torch.arange(3, 12)[None]
    ours, expected = model(**inputs).logits, exact(**inputs).logits
    assert 0 < (ours - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(model(text).logits, base(text).logits)


def test_only_the_local_base_keeps_an_extraction_from_being_published(extracted):
    assert [problem for problem in find_problems(extracted.output) if "local path" not in problem] == []
    files = files_to_publish(extracted.output)
    assert {"vlm/generation_config.json", "extraction.json", "extraction.png"} < set(files)


@pytest.mark.parametrize("refused", ["lora", "gguf", "qnn"])
def test_exports_that_cannot_take_a_vlm_along_say_so(extracted, tmp_path, refused):
    run = {
        "lora": lambda: export_lora(extracted.output, tmp_path / "out"),
        "gguf": lambda: export_llamacpp(extracted.output, tmp_path / "out", language_only=True),
        "qnn": lambda: export_bundle(extracted.output, tmp_path / "out", soc="sm8750", calibration=[]),
    }
    with pytest.raises(ValueError, match="VLM"):
        run[refused]()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verify_accepts_an_extraction(extracted):
    checks = verify_model(extracted.output)
    assert [(check.name, check.detail) for check in checks if not check.ok] == []


def test_an_output_that_exists_is_refused(pair, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        extract_genieblue(*pair, tmp_path / "there")


def test_a_missing_shard_is_named_before_anything_is_read(pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    (vlm / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (vlm / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, which is not there"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_quantized_source_is_refused(pair, tmp_path, which):
    copied = [shutil.copytree(each, tmp_path / each.name) for each in pair]
    config = json.loads((copied[which] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copied[which] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are quantized"):
        extract_genieblue(*copied, tmp_path / "mine")


def test_a_vlm_with_another_vocabulary_is_refused_with_the_number(pair, tmp_path):
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    tokenizer = json.loads((vlm / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary.values())
    moved = {token: index if index < 60 else last + 60 - index for token, index in vocabulary.items()}
    tokenizer["model"]["vocab"] = moved
    (vlm / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"of the base's 120 tokens are missing or have another id"):
        extract_genieblue(vlm, pair[1], tmp_path / "mine")


def test_a_language_model_in_the_place_of_the_vlm_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="is of type 'llama': expected one of gemma3"):
        extract_genieblue(pair[1], pair[1], tmp_path / "mine")


def test_a_vlm_of_another_base_is_refused_and_leaves_nothing(pair, tmp_path):
    other = save_tiny_vlm_pair(tmp_path, change=2.0)[0]
    with pytest.raises(ValueError, match="of their size"):
        extract_genieblue(other, pair[1], tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "vlm"]
