"""The verdict on a bundle: its quantized graphs against the model itself, on requests that were not calibrated on.

That the emulator agrees with the quantized graphs says nothing about what quantization itself costs, and neither do
figures of a toy model: a real one can lose all of its answers at 4 bits while every other check passes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from conversion.qnn.agreement import agreement
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.bundle.runner import QnnRunner, ViewGraphs
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, boundary_names
from conversion.qnn.graphs.names import VIEWS
from conversion.qnn.npu.sessions import cpu_session
from conversion.verdict import Finding, Limits, answers_finding, decide
from hub_cards.verdicts import FAILED, PASSED, UNKNOWN

logger = logging.getLogger(__name__)
SMALLEST_COSINE = 0.98  # of the logits in each view
LIMITS = Limits()
# (model, runner of the bundle) → paired differences of their answers by task, the first over all tasks; entries as in
# `genieblue.evaluation.evaluate.Difference`.
Answers = Callable[[Any, QnnRunner], list[dict[str, Any]]]
IGNORED = -100  # label of a token that no answer has


def judge(
    model: Any,
    folder: str | os.PathLike,
    held_out: Iterable[Mapping[str, Any]],
    answers: Answers | None,
    accept_loss: bool,
) -> dict[str, Any]:
    """Measures a bundle against the model it was made from; the verdict as it is in the metadata.

    Args:
        held_out: requests as a processor encodes them, those with images for the multimodal view; logits count where
            their `labels` have an answer, or everywhere without labels.
        answers: measures answers; by default only logits are compared.
        accept_loss: recorded, if limits are exceeded.
    """
    runner = QnnRunner(folder)
    logits = _compare_logits(model, runner, list(held_out))
    scores = None if answers is None else answers(model, runner)
    findings = [finding for view, found in logits.items() for finding in _logit_findings(view, found)]
    if scores:
        findings.append(answers_finding("the answers", scores[0], LIMITS.answer_loss))
    findings += [(UNKNOWN, f"no held-out request for the {view} view: give more calibration chats")
                 for view in VIEWS if view not in logits]  # fmt: skip
    return decide(findings, accept_loss) | {
        "logits": logits,
        "answers": scores,
        "limits": {"cosine": SMALLEST_COSINE, **asdict(LIMITS)},
    }


def _compare_logits(model: Any, runner: QnnRunner, requests: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By view: how well the logits of CPU-QDQ graphs agree with the model's."""
    found = {}
    for view in VIEWS:
        own = [request for request in requests if (request.get("pixel_values") is not None) == (view == "multimodal")]
        if not own:
            continue
        embedded = []
        for request in own:
            pixels = request.get("pixel_values")
            tiles = None if pixels is None else torch.as_tensor(pixels).numpy()
            ids = np.asarray(request["input_ids"]).reshape(-1)
            embedded.append(runner.embed(ids.tolist(), tiles)[: runner.bundle.metadata["context_length"]])
        logits = bundle_logits(runner.bundle, view, embedded)
        answered = [_answered(request, len(rows)) for request, rows in zip(own, logits, strict=True)]
        bundles = np.concatenate([rows[places] for rows, places in zip(logits, answered, strict=True)])
        models = np.concatenate(
            [_model_logits(model, view, request)[places] for request, places in zip(own, answered, strict=True)]
        )
        targets = [np.asarray(one["labels"]).reshape(-1)[places + 1] for one, places in zip(own, answered, strict=True)
                   if one.get("labels") is not None]  # fmt: skip
        ratio = None if len(targets) < len(own) else _perplexity_ratio(bundles, models, np.concatenate(targets))
        each = agreement(bundles, models)
        found[view] = {
            "requests": len(own),
            "tokens": len(models),
            "cosine": round(each.cosine, 6),
            "largest_error": round(each.largest_error, 6),
            "perplexity_ratio": ratio,
            "same_token": round(float((bundles.argmax(-1) == models.argmax(-1)).mean()), 4),
        }
    return found


def _perplexity_ratio(found: np.ndarray, own: np.ndarray, targets: np.ndarray) -> float:
    """The perplexity of the answers `targets` (tokens,) by logits `found` over that by the model's `own`."""
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets).long())
        for logits in (found, own)
    ]
    return round(float((losses[0] - losses[1]).exp()), 4)


@torch.no_grad()
def _model_logits(model: Any, view: str, request: Mapping[str, Any]) -> np.ndarray:
    """(tokens, vocabulary) of the model itself."""
    device = model.language_model.device
    ids = torch.as_tensor(request["input_ids"]).reshape(1, -1).to(device)
    pixels = request.get("pixel_values")
    images = {} if pixels is None else {"pixel_values": torch.as_tensor(pixels).to(device)}
    return model(input_ids=ids, **images, view=view, use_cache=False).logits[0].float().cpu().numpy()


def _answered(request: Mapping[str, Any], tokens: int) -> np.ndarray:
    """The places among the first `tokens` whose logits choose a token of an answer; all without labels."""
    labels = request.get("labels")
    if labels is None:
        return np.arange(tokens)
    return np.flatnonzero(np.asarray(labels).reshape(-1)[1 : tokens + 1] != IGNORED)


def bundle_logits(bundle: Bundle, view: str, requests: list[np.ndarray]) -> list[np.ndarray]:
    """Logits (tokens, vocabulary) for embeddings (tokens, hidden_size) by the QDQ graphs on the CPU.

    Part by part, so that only one part's graphs are open.
    """
    facts = bundle.metadata
    lengths = facts["chunk_length"], facts["context_length"]
    for number, part in enumerate(facts["parts"]):
        blocks = range(*part["blocks"])
        output = boundary_names(bundle.decoder, blocks)[1]
        graphs = ViewGraphs(bundle, view, lambda record: cpu_session(bundle.path(record["qdq"])))

        def run(
            tokens: int, feeds: Mapping[str, np.ndarray], number: int = number, output: str = output,
            graphs: ViewGraphs = graphs,
        ) -> dict[str, np.ndarray]:  # fmt: skip
            graph = graphs.part(number, tokens)
            outputs = graph.run(feeds)
            return {**outputs, output: graph.outputs[output].decode(outputs[output])}

        empty = graphs.empty_caches()
        requests = [
            ChunkedDecoder(bundle.decoder, run, *lengths, empty=empty, blocks=blocks).read(request)
            for request in requests
        ]
    return requests


def _logit_findings(view: str, found: Mapping[str, Any]) -> Iterator[Finding]:
    yield PASSED, ""
    if found["cosine"] < SMALLEST_COSINE:
        yield FAILED, f"the {view} view's logits have a cosine of {found['cosine']:.4f}, below {SMALLEST_COSINE}"
    ratio, limit = found["perplexity_ratio"], LIMITS.perplexity_ratio
    if ratio is not None and ratio > limit:
        yield FAILED, f"the {view} view's perplexity is {ratio:.3f} times the model's, more than {limit:g}"
