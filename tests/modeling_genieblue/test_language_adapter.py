"""The adapter in the multimodal view: requests, training, and a stock PEFT checkpoint."""

import copy
import threading

import pytest
import torch
from peft import PeftModel
from tiny_genieblue import IMAGE, IMAGE_ID, change_adapter, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import PROMISED_FAMILIES, save_tiny_base, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

promised_family = pytest.mark.parametrize("family", PROMISED_FAMILIES)
# Llama has the layout of most, Phi-3 fused projections, Gemma-3 two kinds of attention, BlueLM its own code.
telling_family = pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "bluelm"])
REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
LABELS = REQUEST.masked_fill(REQUEST == IMAGE_ID, -100)


def answer(model):
    with torch.no_grad():
        return model(REQUEST, pixel_values=PIXELS).logits


def test_first_request_in_inference_mode_leaves_the_model_fit_for_training():
    model = tiny_genieblue()
    with torch.inference_mode():
        first = model(REQUEST, pixel_values=PIXELS).logits
    assert torch.equal(first, answer(model))
    model(REQUEST, pixel_values=PIXELS).logits.sum().backward()
    assert all(p.grad is not None for _, _, p in adapter_parameters(model.multimodal_language_model))


def test_request_between_forward_and_backward_disturbs_neither():
    model = tiny_genieblue().train()
    loss = model(REQUEST, pixel_values=PIXELS, labels=LABELS).loss
    answer(model.eval())
    loss.backward()
    assert all(p.grad is not None for _, _, p in adapter_parameters(model.multimodal_language_model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_runs_under_autocast(dtype):
    """As the Trainer evaluates with `bf16=True`."""
    model = tiny_genieblue(base=tiny_base("llama", dtype=dtype))
    expected = answer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(answer(model).to(dtype), expected, atol=0.3, rtol=0.05)


@telling_family
def test_two_threads_get_their_own_answers(family):
    requests = [{"input_ids": row(5, IMAGE, *prompt(6, seed=seed)[0].tolist()), "pixel_values": tiles(1, seed)}
                for seed in (1, 2)]  # fmt: skip
    model = tiny_genieblue(family)
    with torch.no_grad():
        expected = [model(**request).logits for request in requests]
        text_expected = tiny_base(family)(prompt(6)).logits
    start, wrong = threading.Barrier(2), []

    def ask(index):
        start.wait()
        with torch.no_grad():
            for _ in range(15):
                answer = model(**requests[index]).logits
                text = model(prompt(6)).logits
                if not torch.equal(answer, expected[index]) or not torch.equal(text, text_expected):
                    wrong.append((answer - expected[index]).abs().max())

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_deep_copy_is_independent():
    model = tiny_genieblue()
    expected = answer(model)
    copied = copy.deepcopy(model)
    change_adapter(model)
    assert torch.equal(answer(copied), expected)


# Training


@pytest.mark.parametrize(
    ("family", "reentrant"),
    [("llama", False), ("phi3", False), ("gemma3_text", False), ("bluelm", False), ("llama", True)],
)
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = tiny_genieblue(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert not model.language_model.is_gradient_checkpointing
            assert model.multimodal_language_model.is_gradient_checkpointing
        model(REQUEST, pixel_values=PIXELS, labels=LABELS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_lora_dropout_falls_alike_with_and_without_gradient_checkpointing(reentrant):
    def gradients(checkpointing):
        model = tiny_genieblue(lora_dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        loss = model(REQUEST, pixel_values=PIXELS, labels=LABELS).loss
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-5, rtol=1e-5)


def test_lora_dropout_is_active_in_training_without_gradients():
    model = tiny_genieblue(lora_dropout=0.5).train()
    with torch.no_grad():
        first, second = (model(REQUEST, pixel_values=PIXELS).logits for _ in range(2))
    assert not torch.equal(first, second)


# The adapter is a stock PEFT adapter


@promised_family
@torch.no_grad()
def test_stock_peft_gives_the_multimodal_view(family, tmp_path):
    folder = save_tiny_pair(tmp_path, family)
    model = GenieBlueForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    ids = prompt(12, batch=2)
    plain, multimodal = base(ids).logits, model(ids, view="multimodal").logits
    peft_model = PeftModel.from_pretrained(base, str(folder), subfolder="language_adapter")
    torch.testing.assert_close(peft_model(ids).logits, multimodal, atol=5e-5, rtol=1e-4)
    assert (multimodal - plain).abs().max() > 1e-2
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, plain)
    merged = peft_model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(ids).logits, multimodal, atol=1e-4, rtol=1e-4)


@telling_family
@torch.no_grad()
def test_transformers_itself_loads_the_adapter(family, tmp_path):
    folder = save_tiny_pair(tmp_path, family)
    model = GenieBlueForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    base.load_adapter(str(folder / "language_adapter"))
    ids = prompt(12, batch=2)
    torch.testing.assert_close(base(ids).logits, model(ids, view="multimodal").logits, atol=5e-5, rtol=1e-4)


def test_adapter_trained_further_by_peft_comes_back(tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft_model = PeftModel.from_pretrained(base, str(folder), subfolder="language_adapter", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    peft_model(prompt(), labels=prompt()).loss.backward()
    optimizer.step()
    peft_model.eval().save_pretrained(folder / "language_adapter")
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            model(prompt(), view="multimodal").logits, peft_model(prompt()).logits, atol=5e-5, rtol=1e-4
        )


@torch.no_grad()
def test_merged_into_one_tree_it_is_still_the_multimodal_view():
    """`merge` of PEFT on the view: what a conversion does before it exports."""
    model = tiny_genieblue()
    expected = model(REQUEST, pixel_values=PIXELS).logits
    copied = copy.deepcopy(model)
    for module in copied.multimodal_language_model.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    torch.testing.assert_close(copied(REQUEST, pixel_values=PIXELS).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_multimodal_view_can_be_exported():
    model = tiny_genieblue()
    inputs = {"inputs_embeds": model.embed_request(REQUEST, PIXELS), "use_cache": False}
    program = torch.export.export(model.multimodal_language_model, (), inputs, strict=False)
    expected = model(REQUEST, pixel_values=PIXELS).logits
    torch.testing.assert_close(program.module()(**inputs).logits, expected, atol=5e-5, rtol=1e-4)


def test_whole_model_survives_torch_save(tmp_path):
    model = tiny_genieblue()
    expected = answer(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(answer(loaded), expected)


def test_two_models_share_one_base(tmp_path):
    folder = save_tiny_base("llama", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder)
    first = tiny_genieblue(base=base)
    second = change_adapter(tiny_genieblue(base=base), seed=99)
    assert not torch.equal(first(REQUEST, pixel_values=PIXELS).logits, second(REQUEST, pixel_values=PIXELS).logits)
    assert torch.equal(first(prompt()).logits, second(prompt()).logits)


UNSUPPORTED = {
    "mamba": {"state_size": 4},
    "afmoe": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
              "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_base_of_another_build_is_refused_by_its_class(family):
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4, **UNSUPPORTED[family]}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with pytest.raises(
        ValueError, match=f"(?i){family}ForCausalLM is not a decoder that GenieBlue can adapt"
    ) as error:
        tiny_genieblue(base=base)
    assert "target_modules" not in str(error.value)
