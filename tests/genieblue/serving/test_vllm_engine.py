"""A GenieBlue in vLLM's engine: the answers of both views are those of transformers. Run by `make test-vllm`."""

import random

import pytest
import torch
from openai_chats import LONG, image, mixed_chats, share_of_likeliest, transformers_answers, user
from quantized_bases import KINDS, quantize_base, to_grid
from safetensors.torch import load_file, save_file
from tiny_models import TRAINING_TEXT
from transformers import AutoModelForCausalLM
from vllm_engine import save_wide_pair, vllm_answers

pytest.importorskip("vllm", reason="`make test-vllm` has an environment with it")
import modeling_genieblue  # noqa: E402, F401  # registers the classes that the references are loaded with

pytestmark = pytest.mark.slow

FAMILIES = ("llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma3_text")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and transformers' answers to the mixed chats, by family."""
    made = {}

    def model(family):
        if family not in made:
            folder = save_wide_pair(tmp_path_factory.mktemp(family), family)
            made[family] = folder, transformers_answers(folder, mixed_chats())
        return made[family]

    return model


def answers_of(tmp_path, model, rounds=2, **settings):
    """Answers by name, each a list with one of each round; the rounds are shuffled differently."""
    chats = mixed_chats()
    orders = [random.Random(number).sample(sorted(chats), len(chats)) for number in range(rounds)]
    found = vllm_answers(tmp_path / "engine", model, [[chats[name] for name in order] for order in orders], **settings)
    by_round = [
        {name: answer["ids"] for name, answer in zip(order, answers, strict=True)}
        for order, answers in zip(orders, found, strict=True)
    ]
    return {name: [each[name] for each in by_round] for name in chats}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_that_of_transformers(family, models, tmp_path):
    folder, expected = models(family)
    assert answers_of(tmp_path, folder) == {name: [ids] * 2 for name, ids in expected.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 96, "max_num_seqs": 5},
        {"tensor_parallel_size": 2},  # each rank has one of two heads of keys and values
        {"enforce_eager": False},
    ],
    ids=["prompts in pieces", "tensor parallel", "compiled"],
)
def test_every_answer_is_that_of_transformers_however_it_is_run(settings, models, tmp_path):
    folder, expected = models("llama-tied")
    assert answers_of(tmp_path, folder, rounds=1, **settings) == {name: [ids] for name, ids in expected.items()}


def test_every_answer_is_that_of_transformers_when_requests_are_preempted(models, tmp_path):
    folder, expected = models("llama-tied")
    settings = {"num_gpu_blocks_override": 18, "block_size": 32, "enable_prefix_caching": False}
    answers = answers_of(tmp_path, folder, rounds=1, disable_log_stats=False, **settings)
    assert float((tmp_path / "engine/preemptions").read_text()) >= 1
    assert answers == {name: [ids] for name, ids in expected.items()}


def test_in_bfloat16_texts_are_those_of_the_base_in_vllm_and_images_near_those_of_transformers(models, tmp_path):
    folder, _ = models("llama-tied")
    texts = [[user(line)] for line in TRAINING_TEXT.splitlines()] + [[LONG, user("How many digits?")]]
    images = [chat for name, chat in mixed_chats().items() if name.startswith("image")]
    settings = {"dtype": "bfloat16", "enable_prefix_caching": False}
    pictured, found = vllm_answers(tmp_path / "engine", folder, [images, texts], **settings)
    (alone,) = vllm_answers(tmp_path / "base alone", folder.parent / "base", [texts], **settings)
    assert [answer["ids"] for answer in found] == [answer["ids"] for answer in alone]
    assert share_of_likeliest(folder, images, [answer["ids"] for answer in pictured]) > 0.6


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("w4a16", {"dtype": "bfloat16"}),
        ("w4a16", {"dtype": "bfloat16", "tensor_parallel_size": 2, "max_num_batched_tokens": 96}),
        ("w8a8", {"dtype": "float32"}),
        ("gptq", {"dtype": "bfloat16"}),
    ],
    ids=["w4a16", "w4a16, two ranks, prompts in pieces", "w8a8", "gptq"],
)
def test_on_a_base_that_others_quantized_texts_are_its_own_and_images_near_those_of_the_recorded_one(
    kind, settings, tmp_path
):
    """The recorded base has the very values of the codes, so that 4 bits change nothing but how products round."""
    codes = {}
    bits, group_size, *_ = KINDS[kind]
    folder = save_wide_pair(tmp_path, "qwen2", lambda base: codes.update(to_grid(base, bits, group_size)))
    base = quantize_base(folder.parent / "base", kind, codes)
    texts = [[user(line)] for line in TRAINING_TEXT.splitlines()] + [[LONG, user("How many digits?")]]
    images = [chat for name, chat in mixed_chats().items() if name.startswith("image")]
    settings |= {"enable_prefix_caching": False}
    mixed, found = vllm_answers(
        tmp_path / "engine", folder, [texts[:4] + images, texts],
        hf_overrides={"base_model_name_or_path": str(base), "base_model_revision": None}, **settings,
    )  # fmt: skip
    (alone,) = vllm_answers(tmp_path / "base alone", base, [texts], **settings)
    assert [answer["ids"] for answer in found] == [answer["ids"] for answer in alone]
    assert share_of_likeliest(folder, images, [answer["ids"] for answer in mixed[4:]]) > 0.6


def test_texts_around_tiles_are_those_of_the_processor(models, tmp_path):
    folder = save_wide_pair(tmp_path, "llama-tied", image_prefix="<s>Image:\n", image_suffix="</s>")
    expected = transformers_answers(folder, mixed_chats())
    assert expected != models("llama-tied")[1]
    assert answers_of(tmp_path, folder, max_num_batched_tokens=96) == {
        name: [ids] * 2 for name, ids in expected.items()
    }


def test_views_share_no_cached_block_and_each_shares_its_own(models, tmp_path):
    folder, _ = models("llama-tied")
    text, pictured = [LONG, user("How many digits?")], [LONG, user(image(4), "How many digits?")]
    other = [LONG, user(image(5), "How many digits?")]
    rounds = [[text], [pictured], [text], [other]]
    cached = [answers[0]["cached"] for answers in vllm_answers(tmp_path / "e", folder, rounds, block_size=32)]
    assert cached[0] == cached[1] == 0
    assert cached[2] > 0 and cached[3] > 0


def test_quantization_by_vllm_is_refused(models, tmp_path):
    with pytest.raises(RuntimeError, match="quantization is 'fp8': it would round copies and LoRA too"):
        vllm_answers(tmp_path / "engine", models("llama-tied")[0], [], quantization="fp8")


def test_a_hole_in_the_weights_is_refused_by_the_tensor(tmp_path):
    folder = save_wide_pair(tmp_path, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_tower.encoder.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="vision_tower.encoder.layers.0.self_attn.k_proj.weight is missing"):
        vllm_answers(tmp_path / "engine", folder, [])


def test_of_a_base_those_files_are_loaded_that_were_checked(models, tmp_path):
    folder = save_wide_pair(tmp_path, "llama-tied")
    base = folder.parent / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="300KB")
    (base / "model.safetensors").unlink()
    assert len(list(base.glob("*.safetensors"))) > 1
    for name in ("consolidated.safetensors", "other.safetensors"):
        save_file({"model.norm.weight": torch.zeros(128)}, base / name, {"format": "pt"})
    chats, expected = mixed_chats(), models("llama-tied")[1]
    (answers,) = vllm_answers(tmp_path / "engine", folder, [[chats["text"], chats["image"]]])
    assert [answer["ids"] for answer in answers] == [expected["text"], expected["image"]]
