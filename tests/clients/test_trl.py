"""TRL's `SFTTrainer`, which runs `base_model` and the LM head by itself."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_genieblue import save_tiny_pair
from tiny_models import tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

trl = pytest.importorskip("trl", reason="the extra `clients` installs it")
pytestmark = pytest.mark.slow

QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red sign."}
IMAGE = Image.new("RGB", (50, 30), "red")
SAMPLES = {
    "texts": {"messages": [QUESTION, ANSWER]},
    "images": {"images": [IMAGE], "messages": [QUESTION, ANSWER]},
    "prompts and completions": {"images": [IMAGE], "prompt": [QUESTION], "completion": [ANSWER]},
}


def trainer(folder, sample, output):
    arguments = trl.SFTConfig(
        str(output), per_device_train_batch_size=2, max_length=None, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, trust_remote_code=True, max_steps=3, learning_rate=1e-3, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    # Of texts TRL takes a tokenizer's rows; a processor's it expects as batches of one.
    processing = tiny_tokenizer(add_bos=True) if "images" not in sample else AutoProcessor.from_pretrained(folder)
    data = Dataset.from_list([sample] * 8)
    return trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=data, processing_class=processing)


@pytest.mark.parametrize("kind", SAMPLES)
def test_it_learns_and_leaves_the_base_alone(kind, tmp_path):
    folder = save_tiny_pair(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    training = trainer(folder, SAMPLES[kind], tmp_path / "out")
    base = {name: value.clone() for name, value in training.model.language_model.state_dict().items()}
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, base[name]) for name, value in training.model.language_model.state_dict().items())
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    training.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    expected = training.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_its_gradients_are_those_of_the_models_own_loss(tmp_path):
    """But for their length: TRL counts image tokens among what it learns."""
    training = trainer(save_tiny_pair(tmp_path), SAMPLES["images"], tmp_path / "out")
    model = training.model.train()
    batch = next(iter(training.get_train_dataloader()))

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])

    of_trl = gradient(training.compute_loss(model, dict(batch)))
    own = gradient(model(**batch).loss)
    assert torch.nn.functional.cosine_similarity(of_trl, own, dim=0) > 0.99999
