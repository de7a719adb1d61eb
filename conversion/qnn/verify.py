"""Verifies a bundle: its files, its weights and the outputs of every graph."""

import filecmp
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from conversion.origin import find_origin
from conversion.qnn.agreement import Agreement, agreement, worst
from conversion.qnn.bundle.metadata import PROBE, README, Bundle, encoding_of
from conversion.qnn.bundle.runner import CodedGraph, ViewGraphs
from conversion.qnn.bundle.verdict_text import describe
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, boundary_names
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.names import EXACT, ROUNDED, STAGES, VIEWS, is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.npu.compile import compile_graphs
from conversion.qnn.npu.sessions import cpu_session, npu_session
from conversion.qnn.npu.soc import find_soc
from conversion.qnn.qdq.encoding import WeightCodes, constant_encoding
from conversion.qnn.qdq.files import read_codes, read_constants
from conversion.qnn.qdq.language import codes_digest, probe_lengths
from conversion.qnn.qdq.matrix_rounding import round_matrix
from conversion.qnn.verdict import LARGEST_ERROR, SMALLEST_COSINE
from conversion.verification.checks import Check, CheckFailed, run_check
from hub_cards.verdicts import FAILED

logger = logging.getLogger(__name__)
SIZE_TOLERANCE = 0.02
ROWS = 4096  # of the embeddings, compared at a time
# Of a matrix's distance from the base's, over that of rounding to nearest, by bits: GPTQ goes farther.
LARGEST_EXCESS = {8: 1.05, 4: 2.0}
EMULATOR, FLOAT = "emulator against CPU", "CPU against float"
ACTIVATIONS = "CPU against float with rounded weights"
Measured = dict[tuple[str, str, str], list[Agreement]]  # (graph, tensor, what was compared) → call by call


def verify_bundle(
    path: str | os.PathLike,
    *,
    base: Any = None,
    verdict_on: Callable[..., Mapping[str, Any]] | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Runs every check on a bundle; an exception fails its check, and the others go on.

    The binaries are compiled again and compared byte by byte. The emulator runs the binary of the vision tower; it
    cannot load binaries of several graphs, so each language graph is compiled alone for it.

    Args:
        base: the loaded base, with which the text graphs' weights are compared; by default the one that the bundle
            names, if it is in the Hub's cache and needs no code of its own.
        verdict_on: repeats the verdict on other data, given the bundle's folder, the folder or Hub id of the model it
            was made from, and keyword arguments to load that.
        on_check: called with each finished check.

    Raises `OSError` or `ValueError` only if `path` is not a bundle, or its metadata are damaged.
    """
    bundle = Bundle(path)
    checks = []

    def done(check: Check) -> None:
        checks.append(check)
        if on_check is not None:
            on_check(check)

    problems = bundle.changed_files()
    detail = "; ".join(problems) or f"{len(bundle.metadata['files'].keys() - {README})} files are as exported"
    done(Check("files", not problems, detail))
    verdict = bundle.metadata["verdict"]
    done(Check("verdict of the export", verdict["accepted"], "; ".join(describe(verdict))))
    if verdict_on is not None:
        done(run_check("verdict on other data", lambda: _repeat_verdict(bundle, verdict_on)))
    for name, function in (("vision", _check_vision), ("weights", _check_weights), ("language", _check_language)):
        try:
            for check in function(bundle, base):
                done(check)
        except Exception as error:  # whatever is wrong with a bundle is a result
            done(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def _repeat_verdict(bundle: Bundle, verdict_on: Callable[..., Mapping[str, Any]]) -> str:
    """The verdict against the model that the bundle was made from; a failure that was accepted before is so again."""
    if bundle.metadata.get("model") is None:
        raise CheckFailed("the model that it was made from is not recorded: export the bundle again")
    name, where = find_origin(bundle.metadata["model"], bundle.folder)
    verdict = dict(verdict_on(bundle.folder, name, **where))
    verdict["accepted"] = verdict["accepted"] or _is_accepted(bundle)
    found = "; ".join([f"against {name}", *describe(verdict)])
    if not verdict["accepted"]:
        raise CheckFailed(found)
    return found


def _is_accepted(bundle: Bundle) -> bool:
    """Whether the export failed and that was accepted."""
    verdict = bundle.metadata["verdict"]
    return verdict["result"] == FAILED and verdict["accepted"]


def _check_vision(bundle: Bundle, _base: Any) -> Iterator[Check]:
    record = bundle.metadata["vision"]
    measured: Measured = defaultdict(list)
    yield _compile_again(bundle, record["binary"], {"vision": record["graph"]})
    with np.load(bundle.path(PROBE)) as probe:
        soc = find_soc(bundle.metadata["soc"]["name"])
        feeds = {"pixel_values": probe["vision/pixel_values"]}
        binary = npu_session(bundle.path(record["graph"]["context"]), soc)
        emulated = CodedGraph(record["graph"], binary, {}).run(feeds)
        on_cpu = CodedGraph(record["graph"], cpu_session(bundle.path(record["graph"]["qdq"])), {})
        for name, codes in on_cpu.run(feeds).items():
            decode = on_cpu.outputs[name].decode
            measured[record["binary"], name, EMULATOR].append(agreement(decode(emulated[name]), decode(codes)))
            measured["vision", name, FLOAT].append(agreement(decode(codes), probe[f"vision/{name}"]))
    yield from _report(measured, gates_float=True)


def _compile_again(bundle: Bundle, binary: str, graphs: Mapping[str, Mapping[str, Any]]) -> Check:
    """Whether the QDQ graphs of the bundle give its binary, with every node on the NPU."""
    paths = {name: bundle.path(graph["qdq"]) for name, graph in graphs.items()}
    with TemporaryDirectory() as folder:
        output = Path(folder) / "again"
        compile_graphs(paths, find_soc(bundle.metadata["soc"]["name"]), output, Path(binary).name)
        same = filecmp.cmp(bundle.path(binary), output / Path(binary).name, shallow=False)
        sizes = [path.stat().st_size for path in (bundle.path(binary), output / Path(binary).name)]
    if same:
        return Check(binary, True, "every node on the NPU; compiled again, the bytes are the same")
    # The compiler does not always use the same order, but the size is always the same.
    ok = abs(sizes[0] - sizes[1]) <= SIZE_TOLERANCE * sizes[0]
    detail = (
        f"only its size could be compared: compiled again, its graphs give other bytes ({sizes[0]} before, {sizes[1]} "
        f"now); every node on the NPU; made with {bundle.metadata['compiler']}"
    )
    return Check(binary, ok, detail)


def _report(measured: Measured, *, gates_float: bool) -> Iterator[Check]:
    """One check per graph and comparison.

    Float outputs are only reached as nearly as the bits of the weights allow: the verdict's limits apply to them, to
    the output of a graph and not to its caches, and not at all if the export's loss was accepted (`gates_float`).
    """
    for graph in dict.fromkeys(key[0] for key in measured):
        for kind in (EMULATOR, ACTIVATIONS, FLOAT):
            found = {key[1]: worst(values) for key, values in measured.items() if (key[0], key[2]) == (graph, kind)}
            if not found:
                continue
            first = next(iter(found))
            if kind == FLOAT:
                output = found[first]
                is_near = output.cosine >= SMALLEST_COSINE and output.largest_error <= LARGEST_ERROR
                failed = [first] if gates_float and not is_near else []
            else:
                failed = [name for name, value in found.items() if not value.is_close]
            detail = f"{first} {found[first]}; worst of {len(found)} tensors {worst(found.values())}"
            if failed:
                detail += f"; beyond the limits: {', '.join(failed)}"
            yield Check(f"{graph}: {kind}", not failed, detail)


def _check_weights(bundle: Bundle, base: Any) -> Iterator[Check]:
    """The text graphs and the embedding table have the base's weights, and nothing of the adapter."""
    base = _find_base(bundle.metadata["base"]) if base is None else base
    problems = []
    for number, part in enumerate(bundle.metadata["parts"]):
        graphs = {stage: read_codes(bundle.path(part["graphs"][f"text_{stage}"]["qdq"])) for stage in STAGES}
        if any(is_lora(name) for codes in graphs.values() for name in codes):
            problems.append(f"the text graphs of part {number} contain LoRA")
        digests = {codes_digest(codes) for codes in graphs.values()}
        if digests != {part["base_weight_codes"]}:
            problems.append(f"the text graphs of part {number} have other weights than were exported")
        if base is not None:
            graph = DecoderGraph(base, bundle.decoder, *part["blocks"], rotation=Rotation(bundle.decoder.hidden_size))
            problems += _other_matrices(graph, graphs["prefill"], number)
            problems += _other_constants(bundle, number, graph)
    if base is not None:
        problems += _other_embeddings(bundle, base)
    detail = "those of the base alone, as near as their bits allow, including norms, biases and embeddings"
    if base is None:
        detail = "equal, code by code, to what was exported; not compared with a base: give --base"
    detail = "; ".join(problems) or detail
    yield Check("weights of the text graphs", not problems, detail)


def _find_base(facts: Mapping[str, Any]) -> Any:
    """The base that a bundle names, loaded without network and without its own code; `None` if that is impossible."""
    if facts["name_or_path"] is None:
        return None
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            facts["name_or_path"],
            revision=facts["revision"],
            use_safetensors=True,  # a pickle could run anything
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the check reports that nothing was compared
        logger.debug("The base %s cannot be loaded here", facts["name_or_path"], exc_info=error)
        return None


def _other_matrices(graph: DecoderGraph, codes: Mapping[str, WeightCodes], number: int) -> list[str]:
    """Matrices of the text graphs of a part that are farther from the base's than its own rounding explains.

    Which codes GPTQ chooses depends on the calibration, so they cannot be compared one by one.
    """
    matrices = {name: value.cpu() for name, value in graph.named_buffers() if value.ndim == 2}
    if matrices.keys() != codes.keys():
        return [f"part {number} has other matrices than the base"]
    problems = []
    for name, weight in matrices.items():
        nearest = round_matrix(weight, codes[name].format).decode()
        found, expected = (np.linalg.norm(decoded - weight.numpy()) for decoded in (codes[name].decode(), nearest))
        if not found <= LARGEST_EXCESS[codes[name].bits] * expected + 1e-6:
            problems.append(
                f"{name} of part {number} is not the base's: it differs by {found:.3g}, rounding by {expected:.3g}"
            )
    return problems


def _other_constants(bundle: Bundle, number: int, graph: DecoderGraph) -> list[str]:
    """Norms and biases in the text graphs of a part that differ from the base's."""
    part = bundle.metadata["parts"][number]
    # Norms of hidden states are part of the matrices; what is left of them are ones.
    vectors = {name: v.cpu().numpy() for name, v in graph.named_buffers() if v.ndim == 1 and not (v == 1).all()}
    problems = []
    for stage in STAGES:
        stored = read_constants(bundle.path(part["graphs"][f"text_{stage}"]["qdq"]))
        for name, value in vectors.items():
            encoding = constant_encoding(value)
            if name not in stored or not np.array_equal(stored[name].ravel(), encoding.decode(encoding.encode(value))):
                problems.append(f"{name} of part {number}, text_{stage}, is not the base's")
    return problems


def _other_embeddings(bundle: Bundle, base: Any) -> list[str]:
    """Differences between the embedding table and the base's embeddings."""
    table, encoding = bundle.embeddings(), encoding_of(bundle.metadata["embeddings"])
    weights = base.get_input_embeddings().weight.detach()
    if tuple(weights.shape) != table.shape:
        return [f"the embeddings have the shape {table.shape}, the base's {tuple(weights.shape)}"]
    other, rotation = 0, Rotation(bundle.decoder.hidden_size)
    for start in range(0, len(table), ROWS):
        rows = encoding.encode(rotation.states(weights[start : start + ROWS]).cpu().numpy())
        # Sums of another processor may end on the other side of a rounding.
        other += int((np.abs(rows - table[start : start + ROWS].astype(np.float32)) > 1).any(axis=1).sum())
    return [f"{other} of {len(table)} embeddings are not the base's"] if other else []


def _check_language(bundle: Bundle, _base: Any) -> Iterator[Check]:
    """The four graphs of each part, fed with the outputs of the CPU's graphs."""
    with np.load(bundle.path(PROBE)) as probe:
        streams = {view: probe[f"request/{view}"] for view in VIEWS}
        for number, part in enumerate(bundle.metadata["parts"]):
            measured: Measured = defaultdict(list)
            yield _compile_again(bundle, part["binary"], part["graphs"])
            for view in VIEWS:
                streams[view] = _run_probe(bundle, number, view, streams[view], probe, measured)
            for key in part["graphs"]:
                if not any(label == f"part {number} {key}" for label, _, _ in measured):
                    length = len(streams[key.partition("_")[0]])
                    detail = f"the probe's request of {length} tokens never called it: calibrate on longer requests"
                    yield Check(f"part {number} {key}: {EMULATOR}", False, detail)
            yield from _report(measured, gates_float=not _is_accepted(bundle))


def _run_probe(
    bundle: Bundle,
    number: int,
    view: str,
    stream: np.ndarray,
    probe: Mapping[str, np.ndarray],
    measured: Measured,
) -> np.ndarray:
    """Reads a request in one part, each call on CPU and emulator; returns the input of the next part."""
    facts = bundle.metadata
    part = facts["parts"][number]
    blocks = range(*part["blocks"])
    first_output = boundary_names(bundle.decoder, blocks)[1]
    soc = find_soc(facts["soc"]["name"])
    graphs = ViewGraphs(bundle, view, lambda record: cpu_session(bundle.path(record["qdq"])))
    emulator = ViewGraphs(bundle, view, lambda record: npu_session(bundle.path(record["qdq"]), soc))

    def run(tokens: int, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = f"{view}_{'decode' if tokens == 1 else 'prefill'}"
        on_cpu = graphs.part(number, tokens)
        emulated = emulator.part(number, tokens).run(feeds)
        outputs = on_cpu.run(feeds)
        for tensor, codes in outputs.items():
            decode = on_cpu.outputs[tensor].decode
            label = f"part {number} {name}"
            measured[label, tensor, EMULATOR].append(agreement(decode(emulated[tensor]), decode(codes)))
        outputs[first_output] = on_cpu.outputs[first_output].decode(outputs[first_output])
        return outputs

    lengths = facts["chunk_length"], facts["context_length"]
    decoder = ChunkedDecoder(bundle.decoder, run, *lengths, empty=graphs.empty_caches(), blocks=blocks)
    prompt, decoded = probe_lengths(facts["chunk_length"], len(stream))
    outputs = [decoder.read(stream[:prompt])]
    outputs += [decoder.read(stream[place : place + 1]) for place in range(prompt, prompt + decoded)]
    found = {first_output: np.concatenate(outputs)}
    encodings = graphs.part(number, 1).outputs
    for name, codes in decoder.cache.items():
        found[name] = encodings[name.removesuffix("_in") + "_out"].decode(codes)
    for name, value in found.items():
        for kind, prefix in ((ACTIVATIONS, ROUNDED), (FLOAT, EXACT)):
            expected = probe[f"language_{number}/{view}/{prefix}/{name}"]
            measured[f"part {number} {view}", name, kind].append(agreement(value, expected))
    return found[first_output]
