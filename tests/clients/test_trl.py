"""TRL's `SFTTrainer`, which runs `base_model` and the LM head by itself."""

import itertools

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_genieblue import save_tiny_pair
from transformers import AutoModelForImageTextToText, AutoProcessor

from genieblue.data.collation import ChatCollator

trl = pytest.importorskip("trl", reason="the extra `clients` installs it")
pytestmark = pytest.mark.slow

QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red sign."}
IMAGE = Image.new("RGB", (50, 30), "red")
SAMPLES = {
    "texts": {"messages": [QUESTION, ANSWER]},
    "images": {"images": [IMAGE], "messages": [QUESTION, ANSWER]},
    "prompts and completions": {"images": [IMAGE], "prompt": [QUESTION], "completion": [ANSWER]},
}


# Writes what the tiny tokenizer's own template writes.
MARKING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
HOSTILE = ["\nTwo\nlines\n", " lead and trail ", "It is <image>.", "<|user|> hi"]


def trainer(folder, sample, output):
    arguments = trl.SFTConfig(
        str(output), per_device_train_batch_size=2, max_length=None, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, trust_remote_code=True, max_steps=3, learning_rate=1e-3, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    data, processor = Dataset.from_list([sample] * 8), AutoProcessor.from_pretrained(folder)
    return trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=data, processing_class=processor)


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


def labelled_by_trl(folder, rows, output, template=None, **options) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the rows, without padding."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.chat_template = template or processor.tokenizer.chat_template
    arguments = trl.SFTConfig(
        str(output), per_device_train_batch_size=len(rows), max_length=None, report_to=[], use_cpu=True, bf16=False,
        trust_remote_code=True, **options,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    training = trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=data, processing_class=processor)
    batch = training.data_collator([training.train_dataset[index] for index in range(len(rows))])
    sizes = batch["attention_mask"].sum(dim=1).tolist()
    columns = (batch["input_ids"].tolist(), batch["labels"].tolist(), sizes)
    return [(ids[:size], labels[:size]) for ids, labels, size in zip(*columns, strict=True)]


def labelled_by_us(folder, row) -> tuple[list[int], list[int]]:
    question, answer = row.get("messages") or [*row["prompt"], *row["completion"]]
    images = row.get("images", [])
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question["content"]}]
    sample = {"messages": [{"role": "user", "content": content}, answer], "images": images}
    ours = ChatCollator(AutoProcessor.from_pretrained(folder)).encode(sample)
    return ours["input_ids"], ours["labels"]


@pytest.mark.parametrize("images", [[], [IMAGE], [IMAGE, IMAGE]], ids=len)
def test_answers_that_a_template_marks_are_labelled_as_we_do_it(images, tmp_path):
    folder = save_tiny_pair(tmp_path)
    answers = [{"role": "assistant", "content": text} for text in HOSTILE]
    rows = [{"messages": [QUESTION, answer], **({"images": images} if images else {})} for answer in answers]
    found = labelled_by_trl(folder, rows, tmp_path / "out", MARKING_TEMPLATE, assistant_only_loss=True)
    for (ids, labels), row in zip(found, rows, strict=True):
        our_ids, our_labels = labelled_by_us(folder, row)
        assert ids[: len(our_ids)] == our_ids
        assert labels == our_labels + [-100] * (len(ids) - len(our_ids))


def test_answers_of_a_template_without_marks_are_refused(tmp_path):
    rows = [{"images": [IMAGE], "messages": [QUESTION, ANSWER]}]
    with pytest.raises(ValueError, match="not training-compatible"):
        labelled_by_trl(save_tiny_pair(tmp_path), rows, tmp_path / "out", assistant_only_loss=True)


def test_completions_are_labelled_as_we_do_it_but_for_the_line_break_behind_them(tmp_path):
    folder = save_tiny_pair(tmp_path)
    rows = [
        {"images": images, "prompt": [QUESTION], "completion": [{"role": "assistant", "content": text}]}
        for text, images in zip(HOSTILE, itertools.cycle([[IMAGE], []]))
    ]
    newline = AutoProcessor.from_pretrained(folder).tokenizer("\n")["input_ids"][-1]
    for (ids, labels), row in zip(labelled_by_trl(folder, rows, tmp_path / "out"), rows, strict=True):
        our_ids, our_labels = labelled_by_us(folder, row)
        assert ids == [*our_ids, newline] and labels == [*our_labels, newline]
