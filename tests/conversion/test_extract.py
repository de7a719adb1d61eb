"""A GenieBlue of a VLM and its base, made without training."""

import json
from types import SimpleNamespace

import pytest
import torch
from clean_process import run_clean
from PIL import Image
from tiny_models import tiny_tokenizer
from tiny_vlm_processors import tiny_vlm_processor
from tiny_vlms import assert_answers_as_the_vlm, before_the_head, save_tiny_vlm_pair, tiny_vlm_pair
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    QuantoConfig,
)

import conversion.extract as extract_module
from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from conversion.llamacpp.export import export_llamacpp
from conversion.lora_form import export_lora
from conversion.qnn.export import export_bundle
from conversion.verification.verify import verify_model
from hub_cards.model_parts import model_info
from hub_cards.publish import files_to_publish, find_problems, publish_folder
from modeling_genieblue import (
    GenieBlueForConditionalGeneration,
    VlmGenieBlueForConditionalGeneration,
    VlmGenieBlueProcessor,
)

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
@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "qwen2_5_vl"])
def test_a_pushed_extraction_of_another_family_has_the_vlms_logits_in_a_clean_process(
    family, hub, tmp_path, monkeypatch
):
    own = tiny_vlm_processor(family)
    vlm, base = tiny_vlm_pair(family)
    for name, parts in (("vlm", (vlm, own)), ("base", (base, tiny_tokenizer()))):
        for part in parts:
            part.save_pretrained(tmp_path / name)
        hub.commit_folder(f"maker/{name}", tmp_path / name)
    # Not loaded by name: Qwen's own needs torchvision for videos.
    monkeypatch.setattr(extract_module, "AutoProcessor", SimpleNamespace(from_pretrained=lambda *_, **__: own))
    result = extract_genieblue("maker/vlm", "maker/base", tmp_path / "mine", Choice(copies=4))
    publish_folder(result.output, "you/mine")
    text = VlmGenieBlueProcessor(tiny_tokenizer(), own).apply_chat_template(MESSAGES, add_generation_prompt=True)
    request = dict(own(text=[text], images=[IMAGE], return_tensors="pt"))
    torch.save(request, tmp_path / "request.pt")
    ours, plain = run_clean(
        f"""
        from transformers import AutoModel
        model = AutoModel.from_pretrained("you/mine", trust_remote_code=True)
        request = torch.load({str(tmp_path / "request.pt")!r})
        with torch.no_grad():
            logits = model(**request).logits, model(torch.arange(3, 12)[None]).logits
        answer([each.double().tolist() for each in logits])
        """,
        tmp_path,
        hub.env(),
    )
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    # How a weight lies in memory may change the order of sums.
    assert torch.allclose(torch.tensor(ours).float(), vlm(**request).logits, atol=1e-5)
    assert torch.equal(torch.tensor(plain).float(), base(torch.arange(3, 12)[None]).logits)


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
    assert "2 calibration chats" in calibrated.measurements[0].how
    image, text = (row.how for row in plain.measurements if row.name == "Logits against the VLM's own")
    assert "of a fixed prompt behind one image with a pattern" in image
    assert "prompts without images" in text


def test_logits_behind_an_image_are_measured_without_calibration(pair, tmp_path, monkeypatch):
    def with_other_pixels(self, pixel_values, *args, **kwargs):
        changed = pixel_values and {**pixel_values, "pixel_values": -pixel_values["pixel_values"]}
        return original(self, changed, *args, **kwargs)

    original = VlmGenieBlueForConditionalGeneration._multimodal_forward
    exact = extract_genieblue(*pair, tmp_path / "exact", Choice(copies=4)).measurements
    monkeypatch.setattr(VlmGenieBlueForConditionalGeneration, "_multimodal_forward", with_other_pixels)
    broken = extract_genieblue(*pair, tmp_path / "broken", Choice(copies=4)).measurements
    errors = [[float(row.value.split()[0]) for row in rows[:2]] for rows in (exact, broken)]
    assert [[error < 1e-5 for error in each] for each in errors] == [[True, True], [False, True]]


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
