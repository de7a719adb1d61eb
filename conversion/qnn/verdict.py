"""The verdict on a bundle: its quantized graphs against the model itself, on requests that were not calibrated on.

That the emulator agrees with the quantized graphs says nothing about what quantization itself costs, and neither do
figures of a toy model: a real one can lose all of its answers at 4 bits while every other check passes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch

from conversion.qnn.agreement import agreement
from conversion.qnn.bundle.digests import tensors_digest
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.bundle.runner import QnnRunner, ViewGraphs
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, boundary_names
from conversion.qnn.graphs.names import VIEWS
from conversion.qnn.npu.sessions import cpu_session
from conversion.verdict import (
    FEWEST_SAMPLES,
    Finding,
    Limits,
    answers_finding,
    decide,
    not_measured,
    perplexity_change,
    perplexity_finding,
)
from hub_cards.verdicts import FAILED, PASSED, REFERENCES, UNDECIDED, UNKNOWN

logger = logging.getLogger(__name__)
SMALLEST_COSINE, LARGEST_ERROR = 0.98, 0.25  # of the logits in each view; the error in parts of their range
FEWEST_REQUESTS, FEWEST_TOKENS = FEWEST_SAMPLES, 8  # of each view, below which agreement may be luck
LIMITS = Limits()
# (model, runner of the bundle) → by view, paired differences of their answers by task, the first over all tasks;
# entries as in `genieblue.evaluation.evaluate.Difference`.
Answers = Callable[[Any, QnnRunner], Mapping[str, list[dict[str, Any]]]]
IGNORED = -100  # label of a token that no answer has
HUGE = 1e9  # in place of infinity, which JSON does not have


class HeldOutChats(Protocol):
    """Chats whose answers are compared."""

    digests: Sequence[str]  # one of each file and of what else its scores depend on

    def check(self, processor: Any, context_length: int, stop_ids: Sequence[int]) -> None:
        """`ValueError` that names a chat which no bundle with this context can answer, or whose image is bad."""
        ...

    def answers(self, model: Any, runner: QnnRunner) -> Mapping[str, list[dict[str, Any]]]:
        """See `Answers`."""
        ...


def judge(
    model: Any,
    folder: str | os.PathLike,
    held_out: Iterable[Mapping[str, Any]],
    answers: Answers | None,
    accept_loss: bool,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures a bundle against the model it was made from; the verdict as it is in the metadata.

    Args:
        held_out: requests as a processor encodes them, those with images for the multimodal view; logits count where
            their `labels` have an answer within the bundle's context, or everywhere without labels.
        answers: measures answers; by default only logits are compared.
        accept_loss: recorded, if limits are exceeded.
        remarks: sentences about the data.
    """
    runner = QnnRunner(folder)
    logits, left_out = _compare_logits(model, runner, list(held_out))
    scores = None if answers is None else answers(model, runner)
    findings = [finding for view, found in logits.items() for finding in _logit_findings(view, found)]
    if scores is None:  # near logits do not show that answers are kept
        findings.append((UNKNOWN, "answers were not compared: give held-out chats (--eval-data)"))
    for view, found in (scores or {}).items():
        findings.append(answers_finding(f"the {view} view's answers", found[0], LIMITS.answer_loss))
    context = runner.bundle.metadata["context_length"]
    said = []
    for view in VIEWS:
        beyond = f"{left_out[view]} held-out requests of the {view} view have no answer within {context} tokens"
        if view not in logits:
            reason = f"no held-out request for the {view} view: give more calibration chats"
            findings.append((UNKNOWN, f"{beyond}: give shorter calibration chats" if left_out[view] else reason))
        elif left_out[view]:
            said.append(f"{beyond} and are left out")
    verdict = decide(findings, accept_loss)
    if scores is not None:
        verdict["reasons"] += not_measured([view for view in VIEWS if view not in scores], answers=True)
    return verdict | {
        "remarks": [*said, *remarks],
        "logits": logits,
        "answers": None if scores is None else [{"view": view, **each} for view in scores for each in scores[view]],
        "limits": _limits(),
    }


def judged_on(
    held_out: Sequence[Mapping[str, Any]], eval_data: HeldOutChats | None, accept_loss: bool, remarks: Sequence[str]
) -> dict[str, Any]:
    """All that the verdict on one bundle depends on, as JSON has it: with the same, it need not be given again."""
    tensors = [
        (name, torch.as_tensor(request[name]))
        for request in held_out
        for name in ("input_ids", "labels", "pixel_values")
        if request.get(name) is not None
    ]
    return {
        "held_out": tensors_digest(tensors),
        "eval_data": None if eval_data is None else list(eval_data.digests),
        "accept_loss": accept_loss,
        "remarks": list(remarks),
        "limits": _limits(),
    }


def _limits() -> dict[str, float]:
    return {"cosine": SMALLEST_COSINE, "largest_error": LARGEST_ERROR, **asdict(LIMITS)}


def _compare_logits(
    model: Any, runner: QnnRunner, requests: list[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """By view: how well the logits of CPU-QDQ graphs agree with the model's; and how many requests say nothing."""
    found, left_out, context = {}, {}, runner.bundle.metadata["context_length"]
    for view in VIEWS:
        own = [request for request in requests if (request.get("pixel_values") is not None) == (view == "multimodal")]
        answered = [_answered(request, context) for request in own]
        left_out[view] = sum(len(places) == 0 for places in answered)
        own = [request for request, places in zip(own, answered, strict=True) if len(places)]
        answered = [places for places in answered if len(places)]
        if not own:
            continue
        embedded = []
        for request in own:
            pixels = request.get("pixel_values")
            tiles = None if pixels is None else torch.as_tensor(pixels).numpy()
            embedded.append(runner.embed(_ids(request).tolist(), tiles)[:context])
        pairs = [  # (tokens, vocabulary) by the bundle and by the model, at the answers
            (rows[places], _model_logits(model, view, request)[places])
            for request, rows, places in zip(own, bundle_logits(runner.bundle, view, embedded), answered, strict=True)
        ]
        bundles, models = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
        each = agreement(bundles, models)
        perplexity = _perplexity(own, answered, pairs)
        found[view] = {
            "requests": len(own),
            "tokens": len(models),
            "cosine": round(each.cosine, 6),
            "largest_error": round(min(each.largest_error, HUGE), 6),
            "perplexity_ratio": None if perplexity is None else round(perplexity["ratio"], 4),
            "perplexity": perplexity,
            "same_token": round(float((bundles.argmax(-1) == models.argmax(-1)).mean()), 4),
        }
    return found, left_out


def _perplexity(
    requests: list[Mapping[str, Any]], answered: list[np.ndarray], logits: list[tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any] | None:
    """How the perplexity of the answers changes, as of `perplexity_change`; `None` if a request has no labels."""
    if any(request.get("labels") is None for request in requests):
        return None
    losses: tuple[list[tuple[float, int]], ...] = ([], [])  # of the bundle, of the model
    for request, places, pair in zip(requests, answered, logits, strict=True):
        targets = torch.from_numpy(np.asarray(request["labels"]).reshape(-1)[places + 1]).long()
        for rows, own in zip(losses, pair, strict=True):
            loss = torch.nn.functional.cross_entropy(torch.from_numpy(own), targets, reduction="sum")
            rows.append((float(loss), len(targets)))
    of_bundle, of_model = losses
    return perplexity_change(REFERENCES, of_model, of_bundle)


def _ids(request: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(request["input_ids"]).reshape(-1)


@torch.no_grad()
def _model_logits(model: Any, view: str, request: Mapping[str, Any]) -> np.ndarray:
    """(tokens, vocabulary) of the model itself."""
    device = model.language_model.device
    ids = torch.as_tensor(request["input_ids"]).reshape(1, -1).to(device)
    pixels = request.get("pixel_values")
    images = {} if pixels is None else {"pixel_values": torch.as_tensor(pixels).to(device)}
    return model(input_ids=ids, **images, view=view, use_cache=False).logits[0].float().cpu().numpy()


def _answered(request: Mapping[str, Any], context_length: int) -> np.ndarray:
    """The places within the context whose logits choose a token of an answer; all without labels."""
    labels, tokens = request.get("labels"), min(len(_ids(request)), context_length)
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
    """Those of one view; of too few requests or tokens, only a failure counts."""
    yield PASSED, ""
    if not found["cosine"] >= SMALLEST_COSINE:
        yield FAILED, f"the {view} view's logits have a cosine of {found['cosine']:.4f}, below {SMALLEST_COSINE}"
    if not found["largest_error"] <= LARGEST_ERROR:
        error = f"an error of {found['largest_error']:.1%} of their range"
        yield FAILED, f"the {view} view's logits have {error}, more than {LARGEST_ERROR:.0%}"
    too_few = found["requests"] < FEWEST_REQUESTS or found["tokens"] < FEWEST_TOKENS
    if found["perplexity"] is not None:
        finding = perplexity_finding(view, found["perplexity"], LIMITS.perplexity_ratio, "model")
        if finding[0] == FAILED or not too_few:
            yield finding
    if too_few:
        yield (
            UNDECIDED,
            (
                f"the {view} view was compared on {found['tokens']} answered tokens of {found['requests']} held-out "
                f"requests; at least {FEWEST_TOKENS} tokens of {FEWEST_REQUESTS} requests are needed: give more "
                "calibration chats"
            ),
        )
