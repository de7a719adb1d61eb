"""Validation in training: its loss, its answers, the best weights, early stopping, and the run's log."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_setup import COLOURS, AtStep, chat, make_base, make_data, make_model, make_settings

from genieblue.evaluation.samples import EvaluationDataset
from genieblue.training import run_log
from genieblue.training.memory import peak_resident_memory
from genieblue.training.run_log import RunLog, read_log
from genieblue.training.stages import train
from modeling_genieblue import GenieBlueForConditionalGeneration


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


def held_out():
    pictures = [(colour, Image.new("RGB", (30, 24), colour)) for colour in COLOURS[:3]]
    rows = [chat("<image>\nWhich colour?", f"It is {colour}.", image) for colour, image in pictures]
    return EvaluationDataset([{**row, "task": "colours"} for row in rows] + [chat("What is 9?", "A number, 9.")])


def run(base, output, callbacks=(), **options):
    model, processor = make_model(base)
    settings = make_settings(**options)
    return train(model, processor, make_data(), output, settings, validation=held_out(), callbacks=callbacks), model


@torch.no_grad()
def spoil(model):
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.mul_(-3)


def test_the_validation_loss_is_that_of_the_trained_view(base, tmp_path):
    model, processor = make_model(base)
    settings = make_settings(steps=1, eval_steps=1, learning_rate=1e-30, eval_answers=0)
    train(model, processor, make_data(), tmp_path / "out", settings, validation=held_out())
    (record,) = [record for record in read_log(tmp_path / "out-run") if "eval_loss" in record]
    losses = []
    for place in range(4):
        sample = held_out()[place]
        inputs = processor.apply_chat_template(
            sample.messages, images=sample.images or None, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = processor.apply_chat_template(
            sample.prompt, images=sample.images or None, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )["input_ids"].shape[1]  # fmt: skip
        stop = model.generation_config.eos_token_id
        end = int((inputs["input_ids"][0] == stop).nonzero()[-1]) + 1
        labels = inputs["input_ids"].clone()
        labels[:, :prompt], labels[:, end:] = -100, -100
        with torch.no_grad():
            losses.append((float(model(**inputs, labels=labels, view="multimodal").loss), end - prompt))
    batches = [losses[:2], losses[2:]]  # Trainer takes the mean over batches of the mean over tokens
    means = [sum(loss * count for loss, count in batch) / sum(count for _, count in batch) for batch in batches]
    assert record["eval_loss"] == pytest.approx(sum(means) / 2, rel=1e-3)


def test_answers_are_scored_by_task(base, tmp_path, curves):
    result, _ = run(base, tmp_path / "out", steps=4, eval_steps=2)
    scored = [record for record in result.log_history if "eval_answers_all_exact" in record]
    assert [record["step"] for record in scored] == [2, 4]
    assert {"eval_answers_colours_exact", "eval_answers_other_exact"} <= scored[0].keys()
    assert Image.open(tmp_path / "out-run/curves.png").width > 500


def test_the_best_weights_are_saved_not_the_last(base, tmp_path):
    result, model = run(base, tmp_path / "out", callbacks=[AtStep(8, spoil)], steps=12, eval_steps=2)
    losses = {record["step"]: record["eval_loss"] for record in result.log_history if "eval_loss" in record}
    assert min(losses, key=losses.get) == 8 and result.best == {"step": 8, "eval_loss": losses[8]}
    trained = load_file(tmp_path / "out-run/best/trained_parameters.safetensors")
    saved = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "out")
    for parameters in (dict(saved.named_parameters()), dict(model.named_parameters())):
        assert all(torch.equal(value, parameters[name]) for name, value in trained.items())


def test_training_stops_when_the_loss_no_longer_falls(base, tmp_path):
    result, _ = run(base, tmp_path / "out", callbacks=[AtStep(4, spoil)], steps=30, eval_steps=1, patience=3)
    assert result.steps == 7 and result.best["step"] == 4
    validations = [record for record in result.log_history if "eval_loss" in record]
    assert len(validations) == result.best["step"] + 3


def test_validation_does_not_change_what_is_learned(base, tmp_path):
    model, processor = make_model(base)
    train(model, processor, make_data(), tmp_path / "plain", make_settings(steps=6))
    _, validated = run(base, tmp_path / "validated", steps=6, eval_steps=6)
    others = dict(validated.named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in model.named_parameters())


def test_validation_samples_that_are_also_trained_on_are_counted(base, tmp_path, caplog):
    rows = [chat("What is 1?", "A number, 1."), chat("What is 8?", "A number, 8.")]
    model, processor = make_model(base)
    with caplog.at_level(logging.WARNING):
        train(
            model, processor, make_data(), tmp_path / "out", make_settings(steps=1), validation=EvaluationDataset(rows)
        )
    assert "1 of 2 validation samples are also in the training data" in caplog.text


def test_a_resumed_run_ends_with_the_best_weights_of_the_whole_run(base, tmp_path):
    options = {"steps": 8, "eval_steps": 2, "save_steps": 4, "keep_checkpoints": 9}
    whole, _ = run(base, tmp_path / "whole", **options)
    run(base, tmp_path / "resumed", **options)
    model, processor = make_model(base)
    checkpoint = tmp_path / "resumed-run/checkpoint-4"
    again = train(
        model, processor, make_data(), tmp_path / "resumed", make_settings(**options), validation=held_out(),
        resume=checkpoint,
    )  # fmt: skip
    assert again.best == whole.best


# Log and curves


def test_the_log_has_every_record_with_rates_and_speed_by_part(base, tmp_path, curves):
    result, _ = run(base, tmp_path / "out", steps=3, learning_rates={"lora": 2e-3})
    records = [record for record in read_log(tmp_path / "out-run") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"grad_norm", "samples_per_second", "tokens_per_second", "peak_memory_gb"} <= records[0].keys()
    assert records[-1]["peak_memory_gb"] == pytest.approx(peak_resident_memory() / 1e9, rel=0.1)
    assert records[1]["learning_rate/lora"] == pytest.approx(2 * records[1]["learning_rate/replicated_blocks"])
    assert "learning_rate" not in records[1]  # Trainer's own, of one group
    second, last = (
        {name: record[name] for name in record if name.startswith("learning_rate")} for record in records[1:]
    )
    factor = last["learning_rate/lora"] / second["learning_rate/lora"]
    assert last == pytest.approx({name: factor * rate for name, rate in second.items()})
    assert Image.open(tmp_path / "out-run/curves.png").width > 500
    assert result.loss == records[-1]["loss"]


def test_drawing_takes_at_most_a_hundredth_of_the_time(tmp_path, monkeypatch):
    seconds, drawn = [0.0], []

    def draw_for_two_seconds(*_):
        drawn.append(seconds[0])
        seconds[0] += 2

    monkeypatch.setattr(run_log.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(run_log, "draw_curves", draw_for_two_seconds)
    log, state = RunLog(tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=1)
    for _ in range(100):
        log.on_log(None, state, None, {"loss": 1.0})
        seconds[0] += 5
    assert drawn == [0, 202, 404]


def test_a_resumed_log_has_each_step_once(base, tmp_path):
    options = {"steps": 6, "save_steps": 2, "keep_checkpoints": 9}
    model, processor = make_model(base)
    train(model, processor, make_data(), tmp_path / "out", make_settings(**options))
    with (tmp_path / "out-run/log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as a killed run leaves it
    model, processor = make_model(base)
    checkpoint = tmp_path / "out-run/checkpoint-2"
    train(model, processor, make_data(), tmp_path / "out", make_settings(**options), resume=checkpoint)
    lines = (tmp_path / "out-run/log.jsonl").read_text().splitlines()
    assert [record["step"] for record in map(json.loads, lines) if "loss" in record] == [1, 2, 3, 4, 5, 6]
