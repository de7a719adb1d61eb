"""transformers' own Trainer classes with what they do beyond training."""

import pytest
import torch
from PIL import Image
from tiny_genieblue import tiny_genieblue
from tiny_models import tiny_tokenizer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from modeling_genieblue import GenieBlueProcessor


@pytest.fixture(scope="module")
def processor():
    return GenieBlueProcessor.from_base(
        tiny_tokenizer(add_bos=True), image_token_id=128, image_seq_length=4, tile_size=24
    )


@pytest.fixture(scope="module")
def batch(processor):
    image = Image.new("RGB", (24, 24), "red")
    inputs = processor(text=["<image> What is it?"] * 2, images=[image] * 2, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    return {**inputs, "labels": labels}


def make(kind, arguments, batch, tmp_path, processing_class=None, **options):
    arguments = arguments(
        str(tmp_path), max_steps=1, per_device_eval_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"row": index} for index in range(4)]
    copies = {"data_collator": lambda _: {name: value.clone() for name, value in batch.items()}}
    data = {"train_dataset": data, "eval_dataset": data}
    return kind(tiny_genieblue(), arguments, processing_class=processing_class, **data, **copies)


def test_label_smoothing_compares_with_the_next_token(batch, tmp_path):
    """It asks by the class's name whether labels are to be shifted."""
    trainer = make(Trainer, TrainingArguments, batch, tmp_path, label_smoothing_factor=0.1)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        expected = LabelSmoother(0.1)(trainer.model(**batch), batch["labels"].clone(), shift_labels=True)
    assert torch.equal(loss, expected)


def test_evaluate_and_predict_give_the_models_own(batch, tmp_path):
    trainer = make(Trainer, TrainingArguments, batch, tmp_path)
    with torch.no_grad():
        outputs = trainer.model(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    predicted = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    torch.testing.assert_close(predicted[:2], outputs.logits)


def test_predict_with_generate_answers_as_the_model(batch, processor, tmp_path):
    options = {"predict_with_generate": True, "generation_max_length": 40, "processing_class": processor.tokenizer}
    trainer = make(Seq2SeqTrainer, Seq2SeqTrainingArguments, batch, tmp_path, **options)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = trainer.model.generate(**inputs, max_length=40, do_sample=False)
    predicted = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    assert torch.equal(predicted[:2, : expected.shape[1]], expected)
