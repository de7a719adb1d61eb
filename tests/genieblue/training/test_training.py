"""Training: what each stage changes and what it never changes, learning rates, precision, and what it writes."""

import json
import logging

import pytest
import torch
from training_setup import AtStep, chat, losses, make_base, make_data, make_model, make_settings
from transformers import TrainerCallback

from genieblue.data.chats import ChatDataset
from genieblue.training import stages as training
from genieblue.training.frozen_weights import tensor_digests
from genieblue.training.precision import prepared_for_training
from genieblue.training.stages import TrainingSettings, train
from genieblue.training.structure import GenieBlueStructure
from hub_cards.model_card import card_info_from_folder
from modeling_genieblue import GenieBlueForConditionalGeneration

GROUPS = GenieBlueStructure.groups


def group_of(name: str) -> str | None:
    return GenieBlueStructure.group_of(None, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def bfloat16_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base", dtype=torch.bfloat16)


def values(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_groups(model, before) -> set:
    changed = {name for name, value in values(model).items() if not value.equal(before[name])}
    return {"head" if ".head." in name else group_of(name) or "base" for name in changed}


def text_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_stage_one_trains_the_projector_on_single_tiles_and_nothing_else(base, tmp_path, caplog):
    model, processor = make_model(base)
    before, seen = values(model), []
    model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with caplog.at_level(logging.INFO, logger="genieblue"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(stage=1, epochs=1))
    assert changed_groups(model, before) == {"multi_modal_projector"}
    assert seen == [2, 2, 2, 2]  # eight samples with an image, one tile each
    assert "Skipping 3 of 11 samples without an image" in caplog.text


def test_stage_two_trains_all_that_is_added_and_no_byte_of_the_base(base, tmp_path):
    model, processor = make_model(base)
    before, digests, logits = values(model), tensor_digests(model.language_model, ""), text_logits(model)
    config = model.language_model.config.to_json_string()
    files = {path: path.read_bytes() for path in base.iterdir()}
    caches = []
    model.multimodal_language_model.register_forward_hook(lambda *args: caches.append(args[2].past_key_values))
    train(model, processor, make_data(), tmp_path / "out", make_settings(steps=3))
    assert changed_groups(model, before) == set(GROUPS)
    assert caches == [None] * 3
    assert tensor_digests(model.language_model, "") == digests
    assert text_logits(model).equal(logits)
    assert model.language_model.config.to_json_string() == config
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    assert {path: path.read_bytes() for path in base.iterdir()} == files
    names = dict(model.named_parameters())
    copies = [name for name in names if group_of(name) == "replicated_blocks"]
    assert len(copies) == 9 and all(not names[name].equal(before[name]) for name in copies)


def test_every_trained_tensor_of_stage_two_learns(base, tmp_path):
    model, processor = make_model(base)
    before = values(model)
    train(model, processor, make_data(), tmp_path / "out", make_settings(steps=4))
    still = [
        name for name, value in values(model).items()
        if group_of(name) is not None and value.equal(before[name])
    ]  # fmt: skip
    assert still == []


def test_text_only_chats_train_the_multimodal_view(base, tmp_path):
    model, processor = make_model(base)
    before, logits = values(model), text_logits(model)
    rows = [row for row in make_data() if not row["images"]]
    train(model, processor, rows, tmp_path / "out", make_settings(steps=3))
    assert changed_groups(model, before) == {"replicated_blocks", "lora"}
    assert text_logits(model).equal(logits)
    with torch.no_grad():
        assert not model(torch.arange(3, 40)[None], view="multimodal").logits.equal(logits)


def test_learning_rates_decay_from_the_output_of_the_vision_tower_to_its_input(base):
    model, _ = make_model(base)
    settings = TrainingSettings(stage=2, learning_rates={"lora": 2e-3})
    structure = GenieBlueStructure(model)
    rates = structure.recipe(2).learning_rates(None, settings.learning_rates)
    with prepared_for_training(structure, GROUPS, gradient_checkpointing=False):
        groups = structure.parameter_groups(rates, settings.vision_layer_decay, 0.05)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert all(group_of(name) is not None for name in trained)
    # Two blocks: 0.9 for the last, 0.9² for the first, 0.9³ for the embeddings, 1 for the norm behind them.
    assert trained["vision_tower.encoder.layers.1.mlp.fc1.weight"] == (1e-4 * 0.9, 0.05)
    assert trained["vision_tower.encoder.layers.0.mlp.fc1.weight"] == (1e-4 * 0.9**2, 0.05)
    assert trained["vision_tower.encoder.layers.0.mlp.fc1.bias"] == (1e-4 * 0.9**2, 0.0)
    assert trained["vision_tower.embeddings.patch_embedding.weight"] == (1e-4 * 0.9**3, 0.05)
    assert trained["vision_tower.post_layernorm.weight"] == (1e-4, 0.0)
    found = {group: {rate for name, (rate, _) in trained.items() if group_of(name) == group} for group in GROUPS}
    assert found["multi_modal_projector"] == found["replicated_blocks"] == {1e-4} and found["lora"] == {2e-3}
    assert {group["group"] for group in groups} == set(GROUPS)
    assert len(trained) == sum(group_of(name) is not None for name, _ in model.named_parameters())


def test_defaults_are_the_papers_recipe(base, tmp_path, monkeypatch):
    seen = {}

    def stop_before_training(trainer, **kwargs):
        seen.update(groups=trainer.create_optimizer().param_groups, arguments=trainer.args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.StageTrainer, "_inner_training_loop", stop_before_training)
    for stage, rate, warmup in ((1, 1e-3, 34), (2, 1e-4, 530)):
        model, processor = make_model(base)
        with pytest.raises(KeyboardInterrupt):
            train(model, processor, make_data(), tmp_path / "out", TrainingSettings(stage=stage, show_progress=False))
        assert max(group["lr"] for group in seen["groups"]) == rate
        assert {(group["betas"], group["eps"]) for group in seen["groups"]} == {((0.9, 0.98), 1e-6)}
        assert {group["weight_decay"] for group in seen["groups"]} == {0.05, 0.0}
        steps = GenieBlueStructure.stages[stage].steps
        assert seen["arguments"].get_warmup_steps(steps) == warmup
        assert seen["arguments"].lr_scheduler_type == "cosine"


def test_gradient_checkpointing_gives_the_same_weights_and_leaves_the_base_alone(base, tmp_path):
    flags, results = [], []

    def look(model):
        flags.append({name for name, m in model.multimodal_language_model.named_modules()
                      if getattr(m, "gradient_checkpointing", False)})  # fmt: skip
        base_modules = model.language_model.modules()
        assert not any(getattr(m, "gradient_checkpointing", False) or m.training for m in base_modules)

    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        model, processor = make_model(base)
        settings = make_settings(steps=3, gradient_checkpointing=checkpointing)
        train(model, processor, make_data(), tmp_path / name, settings, callbacks=[AtStep(1, look)])
        results.append(values(model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not flags[0] and flags[1]
    assert all(value.equal(results[1][name]) for name, value in results[0].items())


def test_accumulated_batches_are_one_large_batch(base, tmp_path):
    results = []
    for name, (batch_size, accumulation) in {"large": (4, 1), "small": (1, 4)}.items():
        model, processor = make_model(base, lora_dropout=0.0)
        settings = make_settings(steps=2, batch_size=batch_size, gradient_accumulation=accumulation, warmup_steps=0)
        results.append(losses(train(model, processor, make_data(), tmp_path / name, settings)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_bad_image_in_a_worker_is_told_in_one_line(base, tmp_path):
    model, processor = make_model(base)
    (tmp_path / "broken.png").write_bytes(b"no image")
    data = [chat("<image>\nWhich colour?", "None.", str(tmp_path / "broken.png"))]
    with pytest.raises(ValueError, match=r"^sample 0: .*broken.png.*--skip-bad") as error:
        train(model, processor, data, tmp_path / "out", make_settings(steps=1, num_workers=1))
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_workers_that_read_the_data_do_not_change_what_is_learned(base, tmp_path):
    results = []
    for workers in (0, 2):
        model, processor = make_model(base)
        settings = make_settings(steps=3, num_workers=workers)
        results.append(losses(train(model, processor, make_data(), tmp_path / str(workers), settings)))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float32 base", "bfloat16 base"])
def test_bfloat16_trains_float32_weights_and_gives_back_the_models_precision(
    in_bfloat16, base, bfloat16_base, tmp_path
):
    model, processor = make_model(bfloat16_base if in_bfloat16 else base)
    if in_bfloat16:
        model.vision_tower.to(torch.bfloat16)
    before = {name: value.dtype for name, value in model.named_parameters()}
    digests, seen, activations = tensor_digests(model.language_model, ""), {}, set()
    model.multimodal_language_model.register_forward_hook(lambda *args: activations.add(args[2].logits.dtype))

    def look(model):
        seen.update({group_of(name): parameter.dtype for name, parameter in model.named_parameters()})

    settings = make_settings(steps=3, bf16=None if in_bfloat16 else True)
    result = train(model, processor, make_data(), tmp_path / "out", settings, callbacks=[AtStep(2, look)])
    assert activations == {torch.bfloat16}
    assert {seen[part] for part in GROUPS} == {torch.float32}
    assert tensor_digests(model.language_model, "") == digests
    assert {name: value.dtype for name, value in model.named_parameters()} == before
    assert all(loss == loss for loss in losses(result).values())
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {name: value.dtype for name, value in loaded.named_parameters()} == before


def test_precisions_that_cannot_be_trained_are_refused(base, bfloat16_base, tmp_path):
    model, processor = make_model(bfloat16_base)
    with pytest.raises(ValueError, match="torch.bfloat16 and bf16 is off.*--dtype float32"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=1, bf16=False))
    model.language_model.half()
    with pytest.raises(ValueError, match="torch.float16"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=1))


def test_output_is_a_complete_model_whose_card_tells_both_stages(base, tmp_path):
    model, processor = make_model(base)
    train(model, processor, make_data(), tmp_path / "one", make_settings(stage=1, steps=2))
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "one")
    result = train(model, processor, make_data(), tmp_path / "two", make_settings(steps=2, save_steps=1))
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert all(value.equal(values(loaded)[name]) for name, value in values(model).items())
    assert not any(path.name.startswith("checkpoint") for path in (tmp_path / "two").iterdir())
    recipe = card_info_from_folder(tmp_path / "two").recipe
    assert list(recipe) == ["stage 1", "stage 2"] and recipe["stage 1"]["trained"] == "multi_modal_projector"
    assert recipe["stage 2"]["last loss"] == round(result.loss, 4)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "replicated_blocks, lora" in card and "stage 1" in card
    assert '"use_cache": false' not in (tmp_path / "two" / "config.json").read_text()
    assert all(entry["samples_per_second"] > 0 for entry in result.log_history if "loss" in entry)


def test_training_into_a_folder_in_use_keeps_its_readme_and_drops_old_measurements(base, tmp_path):
    model, processor = make_model(base)
    model.save_pretrained(tmp_path / "out", processor=processor)
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "measurements.json").write_text("[]")
    (tmp_path / "out" / ".eval_results").mkdir()
    train(model, processor, make_data(), tmp_path / "out", make_settings(steps=1))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert not {"measurements.json", ".eval_results"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "training_recipe.json").read_text())["stage 2"]["steps"] == 1


def spoil(model) -> None:
    with torch.no_grad():
        model.multi_modal_projector.linear_1.weight.fill_(float("nan"))


def test_loss_that_is_not_finite_stops_before_a_weight_is_spoiled(base, tmp_path):
    model, processor = make_model(base)
    before = values(model)
    rows = make_data()[:8]
    options = {"steps": 5, "save_steps": 1, "shuffle": False}
    with pytest.raises(ValueError, match=r"loss is nan at step 2 \(samples: sample 2, sample 3\)"):
        train(model, processor, rows, tmp_path / "out", make_settings(**options), callbacks=[AtStep(1, spoil)])
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out-run").glob("checkpoint-*")] == ["checkpoint-1"]
    weights = values(model)
    assert all(value.isfinite().all() for name, value in weights.items() if "linear_1.weight" not in name)
    assert not model.training and {name: value.dtype for name, value in weights.items()} == {
        name: value.dtype for name, value in before.items()
    }


def test_checkpoint_with_a_weight_that_is_not_finite_is_not_written(base, tmp_path, monkeypatch):
    """The step before, whose loss was still finite, left it."""
    model, processor = make_model(base)
    step = torch.optim.AdamW.step

    def spoiling_step(optimizer, *args):
        step(optimizer, *args)
        if next(iter(optimizer.state.values()))["step"] == 2:
            spoil(model)

    monkeypatch.setattr("torch.optim.AdamW.step", spoiling_step)
    with pytest.raises(ValueError, match="linear_1.weight contains NaN or infinity after step 2"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=5, save_steps=1))
    assert [path.name for path in (tmp_path / "out-run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_lack_of_gpu_memory_names_the_settings_to_change(base, tmp_path):
    model, processor = make_model(base)

    def fail(_model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    with pytest.raises(ValueError, match=r"Tried.*GiB\): lower `batch_size` \(2\).*gradient_checkp.*max_length.*fsdp"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=2), callbacks=[AtStep(1, fail)])


def test_base_that_changes_during_training_is_noticed_and_nothing_is_saved(base, tmp_path):
    model, processor = make_model(base)

    def write_to_base(model):
        with torch.no_grad():
            model.language_model.get_input_embeddings().weight[5, 3] += 1e-6

    with pytest.raises(ValueError, match="Training changed the base: model.embed_tokens.weight"):
        train(
            model,
            processor,
            make_data(),
            tmp_path / "out",
            make_settings(steps=2),
            callbacks=[AtStep(1, write_to_base)],
        )
    assert not (tmp_path / "out").exists()


def test_parameter_of_the_base_is_never_handed_to_the_optimizer(base):
    model, _ = make_model(base)
    model.vision_tower.head.requires_grad_(False)
    model.language_model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head.weight requires a gradient"):
        GenieBlueStructure(model).parameter_groups(dict.fromkeys(GROUPS, 1e-4), 0.9, 0.05)
    with prepared_for_training(GenieBlueStructure(model), GROUPS, gradient_checkpointing=False):
        assert not model.language_model.lm_head.weight.requires_grad
    assert not model.language_model.lm_head.weight.requires_grad


def test_data_without_anything_to_learn_is_refused_with_the_reason(base, tmp_path):
    model, processor = make_model(base)
    bad, no_image = chat("Hello", " "), chat("Hello", "No image.")
    for data, stage, reason in (
        ([], 1, "^The data is empty"),
        (ChatDataset([bad, bad], skip_bad=True), 2, "^All 2 samples are bad"),
        ([no_image], 1, "^None of the 1 samples has an image.*or train stage 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            train(model, processor, data, tmp_path / "out", make_settings(stage=stage))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "^This model has no chat template"),
        ("", "^The model's chat template is empty"),
        ("{{ messages[0]['content'] + no_token }}", "^The model's chat template fails .*'no_token' is undefined"),
        ("{{ messages[-1]['content'].split('\n')[-1] }}", "^The model's chat template drops '<image>' from"),
    ],
    ids=["none", "empty", "undefined", "no image"],
)
def test_a_chat_template_that_cannot_be_used_is_told_before_training(base, tmp_path, template, reason):
    model, processor = make_model(base)
    processor.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=1))
    assert not list(tmp_path.iterdir())


def test_a_template_that_breaks_in_a_worker_is_told_in_one_line(base, tmp_path):
    model, processor = make_model(base)
    broken = "{% if 'What is' in messages[0]['content'] %}{{ '' + no_token }}{% endif %}"
    processor.tokenizer.chat_template = broken + processor.tokenizer.chat_template
    settings = make_settings(epochs=1, num_workers=1)
    with pytest.raises(
        ValueError, match="^The model's chat template fails .*for example for sample .*correct the template.$"
    ):
        train(model, processor, make_data(), tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stage": 1, "steps": 2, "epochs": 1}, "give only one of them"),
        ({"stage": 2, "batch_size": 0}, "`batch_size` is 0"),
        ({"stage": 2, "warmup_steps": -1}, "`warmup_steps` is -1"),
        ({"stage": 2, "weight_decay": float("nan")}, "`weight_decay` is nan"),
        ({"stage": 2, "max_grad_norm": 0.0}, "`max_grad_norm` is 0.0"),
        ({"stage": 2, "seed": -1}, "`seed` is -1"),
        ({"stage": 2, "seed": 2**32}, "`seed` is 4294967296"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        TrainingSettings(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"stage": 3}, "stage is 3: expected 1 or 2"),
     ({"stage": 1, "learning_rates": {"lora": 1e-3}}, "for lora: this stage trains multi_modal_projector")],
)  # fmt: skip
def test_settings_that_the_model_has_no_use_for_are_refused(options, reason, base, tmp_path):
    model, processor = make_model(base)
    with pytest.raises(ValueError, match=reason):
        train(model, processor, make_data(), tmp_path / "out", make_settings(**options))


def test_a_base_whose_generation_never_stops_is_refused(base, tmp_path):
    model, processor = make_model(base)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="never stops.*`model.generation_config`"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(steps=1))
    assert not list(tmp_path.iterdir())


def test_weights_that_the_last_step_broke_are_not_saved(base, tmp_path):
    model, processor = make_model(base)

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.multi_modal_projector.linear_2.bias.data.fill_(float("inf"))

    with pytest.raises(ValueError, match="NaN or infinity after the last step"):
        settings = make_settings(stage=1, steps=1)
        train(model, processor, make_data(), tmp_path / "out", settings, callbacks=[Breaks()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["base", "data", "file"])
def test_an_output_that_is_taken_is_refused_before_anything_is_trained(base, tmp_path, taken):
    model, processor = make_model(base)
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "data" / "notes.txt", tmp_path / "file"):
        path.write_text("mine")
    output = {"base": base, "data": tmp_path / "data", "file": tmp_path / "file"}[taken]
    before = values(model)
    with pytest.raises((ValueError, OSError), match="give another folder|is a file or inside one"):
        train(model, processor, make_data(), output, make_settings(steps=1))
    assert changed_groups(model, before) == set()
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"
