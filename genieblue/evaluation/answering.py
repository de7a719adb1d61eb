"""Answers of a PyTorch model to evaluation samples, in batches, and likelihoods of given answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from conversion.chat_ids import IGNORED, ChatRow, answer_ids, answer_text, stop_token_ids
from conversion.chat_template import check_processor_template
from conversion.vlm_chat_ids import VlmChatFormat
from genieblue.data.vlm_collation import VlmChatCollator
from genieblue.evaluation.samples import EvaluationSample
from genieblue.serving.conversation import GREEDY
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT


class Answerer(Protocol):
    """What `evaluate` asks."""

    batch_size: int
    processor: Any
    precision: str  # of weights and activations, for the report

    def answers(self, samples: Sequence[EvaluationSample], max_new_tokens: int) -> list[str]:
        """One greedy answer to each sample; all of `samples` have images, or none."""
        ...

    def log_likelihoods(self, sample: EvaluationSample) -> list[float]:
        """Of each of the sample's choices as the whole answer, its end included."""
        ...

    def view(self, sample: EvaluationSample) -> str:
        """The view that answers a sample."""
        ...


class ModelAnswerer:
    """Answers of a GenieBlue in memory, 16-bit or quantized."""

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 8, view: str | None = None):
        """`view` is for samples without images, by default the text view; samples with images run the other one.

        Raises `ValueError` if the processor has no usable chat template.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}: expected at least 1.")
        check_processor_template(processor)
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self._view = view
        self.precision = _precision(model)
        self._stop_ids = stop_token_ids(model.generation_config)

    def view(self, sample: EvaluationSample) -> str:
        """The view that answers a sample."""
        return MULTIMODAL if sample.images else self._view or TEXT

    @torch.no_grad()
    def answers(self, samples: Sequence[EvaluationSample], max_new_tokens: int) -> list[str]:
        """One greedy answer to each sample, without the stop token; all of `samples` have images, or none."""
        images = [list(sample.images) for sample in samples]
        inputs = self.processor.apply_chat_template(
            [sample.prompt for sample in samples],
            images=images if any(images) else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        pad = self.processor.tokenizer.pad_token_id
        generated = self.model.generate(
            **inputs,
            view=self.view(samples[0]),
            max_new_tokens=max_new_tokens,
            num_beams=1,
            pad_token_id=next(iter(self._stop_ids), 0) if pad is None else pad,
            **GREEDY,
        )
        rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            answer_text(self._format(sample), sample.prompt, self._until_stop(row, sample))
            for sample, row in zip(samples, rows, strict=True)
        ]

    @torch.no_grad()
    def log_likelihoods(self, sample: EvaluationSample) -> list[float]:
        """Of each of the sample's choices as the whole answer, with the stop token that ends it."""
        pixels, num_tiles = image_tiles(self.processor, sample)
        rows = choice_rows(self.processor, sample, num_tiles, self._stop_ids)
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            length = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
            for index, (prompt, answer) in enumerate(batch):
                size = len(prompt) + len(answer)
                ids[index, :size], mask[index, :size] = torch.tensor(prompt + answer), 1
                labels[index, len(prompt) : size] = torch.tensor(answer)
            images = {} if pixels is None else {"pixel_values": pixels.repeat(len(batch), 1, 1, 1)}
            inputs = {"input_ids": ids, "attention_mask": mask, **images}
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            logits = self.model(**inputs, view=self.view(sample), use_cache=False).logits
            found += _summed_log_likelihoods(logits, labels.to(logits.device))
        return found

    @torch.no_grad()
    def reference_logits(self, sample: EvaluationSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits (tokens, vocabulary) for the first reference, with its stop token, and its ids (tokens,)."""
        pixels, num_tiles = image_tiles(self.processor, sample)
        reference = replace(sample, choices=sample.references[:1])
        ((prompt, answer),) = choice_rows(self.processor, reference, num_tiles, self._stop_ids)
        images = {} if pixels is None else {"pixel_values": pixels.to(self.model.device)}
        ids = torch.tensor([prompt + answer], device=self.model.device)
        logits = self.model(input_ids=ids, **images, view=self.view(sample), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1].float(), ids[0, len(prompt) :]

    def _format(self, sample: EvaluationSample) -> Any:
        """What formats and decodes a chat, as `chat_ids` asks a processor."""
        return self.processor

    def _stops(self, sample: EvaluationSample) -> tuple[int, ...]:
        """The tokens that stop the answer to a sample."""
        return self._stop_ids

    def _until_stop(self, ids: list[int], sample: EvaluationSample) -> list[int]:
        """The ids up to the first stop token, behind which a batch is padded."""
        stops = self._stops(sample)
        return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


class VlmAnswerer(ModelAnswerer):
    """Answers of a GenieBlue whose images run a VLM: one request at a time, as its own processor encodes it."""

    def __init__(self, model: Any, processor: Any, *, view: str | None = None):
        """`view` as for `ModelAnswerer`; `ValueError` for texts in the multimodal view, which is the VLM's."""
        super().__init__(model, processor, batch_size=1, view=view)
        self._stop_ids_of_vlm = stop_token_ids(model.vlm.generation_config)

    def view(self, sample: EvaluationSample) -> str:
        """The view that answers a sample; `ValueError` for a text that is to run the VLM."""
        view = super().view(sample)
        if view == MULTIMODAL and not sample.images:
            raise ValueError("Text runs the base of this GenieBlue: its VLM is asked with an image only.")
        return view

    @torch.no_grad()
    def log_likelihoods(self, sample: EvaluationSample) -> list[float]:
        """As `ModelAnswerer.log_likelihoods`."""
        found = []
        for choice in sample.choices:
            logits, answer = self._answer_logits(sample, choice)
            found.append(float(torch.log_softmax(logits, dim=-1).gather(1, answer[:, None]).double().sum()))
        return found

    @torch.no_grad()
    def reference_logits(self, sample: EvaluationSample) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ModelAnswerer.reference_logits`."""
        return self._answer_logits(sample, sample.references[0])

    def _answer_logits(self, sample: EvaluationSample, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits (tokens, vocabulary) for an answer with its stop token, and its ids (tokens,)."""
        chat = [*sample.prompt, {"role": "assistant", "content": text}]
        chat_format = self._format(sample)
        prompt, answer = chat_format.answer(chat, self._stops(sample))
        inputs = {"input_ids": torch.tensor([prompt + answer])}
        if sample.images:
            collator = VlmChatCollator(self.processor)
            row = collator.row(ChatRow(prompt + answer, prompt + answer), chat_format.inputs_of(prompt))
            inputs = {name: value for name, value in collator([[row]]).items() if name != "labels"}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        logits = self.model(**inputs, view=self.view(sample), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1].float(), inputs["input_ids"][0, len(prompt) :]

    def _stops(self, sample: EvaluationSample) -> tuple[int, ...]:
        return self._stop_ids_of_vlm if sample.images else self._stop_ids

    def _format(self, sample: EvaluationSample) -> Any:
        return VlmChatFormat(self.processor, sample.images)


def answerer_of(model: Any, processor: Any, *, batch_size: int = 8, view: str | None = None) -> ModelAnswerer:
    """What answers for a GenieBlue, by the kind of its multimodal side."""
    if getattr(model.config, "vlm_config", None) is not None:
        return VlmAnswerer(model, processor, view=view)
    return ModelAnswerer(model, processor, batch_size=batch_size, view=view)


def image_tiles(processor: Any, sample: EvaluationSample) -> tuple[torch.Tensor | None, list[int]]:
    """A sample's tiles (num_tiles, 3, tile_size, tile_size), and how many each image has."""
    if not sample.images:
        return None, []
    pixels = processor.image_processor(sample.images, return_tensors="pt")
    return pixels["pixel_values"], pixels["num_tiles"].tolist()


def choice_rows(
    processor: Any, sample: EvaluationSample, num_tiles: Sequence[int], stop_ids: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt and of the answer for each choice; the answers end with a stop token, as in training."""
    chats = [[*sample.prompt, {"role": "assistant", "content": choice}] for choice in sample.choices]
    return [answer_ids(processor, chat, num_tiles, stop_ids) for chat in chats]


def _summed_log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Logits (rows, length, vocabulary), labels (rows, length) → by row the sum over labelled tokens."""
    sums = []
    for row_logits, row_labels in zip(logits[:, :-1], labels[:, 1:], strict=True):
        labelled = row_labels != IGNORED
        chosen = torch.log_softmax(row_logits[labelled].float(), dim=-1)
        sums.append(float(chosen.gather(1, row_labels[labelled][:, None]).double().sum()))
    return sums


def _precision(model: Any) -> str:
    """`bfloat16`, or the quantized parts with it."""
    quantization = getattr(model.config, "quantization", None)
    dtype = str(model.language_model.dtype).removeprefix("torch.")
    if quantization is None:
        return dtype
    parts = {part: value for part, value in quantization.items() if isinstance(value, str) and value[:1] == "w"}
    return ", ".join(f"{part} {value}" for part, value in parts.items()) or dtype
