"""Float graphs with `.encodings`, which AIMET itself reads."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import onnx
from tiny_qnn import CHUNK, CONTEXT, SETTINGS, embeddings_and_logits, requests, save_pair, tiny_model

from conversion.qnn.agreement import agreement
from conversion.qnn.export import export_bundle
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import make_decoder_shape
from conversion.qnn.graphs.names import is_lora
from conversion.qnn.npu.sessions import cpu_session
from conversion.qnn.qdq.aimet_encodings import save_with_encodings
from conversion.qnn.qdq.encoding import WeightFormat
from conversion.qnn.qdq.files import read_codes
from conversion.qnn.qdq.language import LanguageSettings, make_float_graph
from conversion.qnn.qdq.matrix_rounding import round_matrix
from conversion.qnn.qdq.quantize import apply_codes, encodings_of, quantize_graph, round_weights, weights_of
from conversion.qnn.qdq.ranges import measure_ranges
from conversion.qnn.qdq.stored_graphs import ConstantStore, save_copy


@pytest.fixture
def aimet():
    return pytest.importorskip("aimet_onnx", reason="needs the extra `aimet`")


def calls_of(model, shape, source, folder):
    """The inputs of every call of a float graph for chunks, over some requests."""
    session, calls = cpu_session(save_copy(model, folder / "float-run.onnx")), []
    names = [value.name for value in session.get_outputs()]

    def run(_tokens, feeds):
        calls.append(dict(feeds))
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    for seed in range(4):
        embeddings, _ = embeddings_and_logits(source, "multimodal", 2 * CHUNK + 3, seed=seed)
        ChunkedDecoder(shape, run, CHUNK, CONTEXT).read(embeddings, only_chunks=True)
    return calls


def with_encodings(folder, *, group_size=0, **settings):
    """A float graph with its encodings in `folder`, and its QDQ graph beside it."""
    source = tiny_model("llama")
    shape = make_decoder_shape(source.language_model, CHUNK, CONTEXT)
    graph = DecoderGraph(source.multimodal_language_model, shape)
    model = make_float_graph(graph, LanguageSettings(CHUNK, CONTEXT, 16, "constants"), "prefill")
    codes = round_weights(model, lambda name: 8 if is_lora(name) else 4, **settings)
    if group_size:
        for name, (weight, _) in weights_of(model).items():
            if not is_lora(name):
                codes[name] = round_matrix(torch.from_numpy(weight.copy()), WeightFormat(4, group_size))
    apply_codes(model, codes)
    calls = calls_of(model, shape, source, folder)
    encodings = encodings_of(model, measure_ranges(model, calls, folder))
    quantized = save_copy(quantize_graph(model, encodings, codes, name="t"), folder / "quantized.onnx")
    with ConstantStore(folder / "float.data") as store:
        save_with_encodings(model, encodings, codes, store, folder / "float.onnx")
    return encodings, codes, calls, quantized


def read_encodings(path):
    return json.loads(path.with_suffix(".encodings").read_text())


def test_encodings_say_what_the_codes_say(tmp_path):
    encodings, codes, calls, _ = with_encodings(tmp_path)
    content = read_encodings(tmp_path / "float")
    assert content["version"] == "1.0.0"
    activations = {each["name"]: each for each in content["activation_encodings"]}
    parameters = {each["name"]: each for each in content["param_encodings"]}
    assert set(activations) == set(encodings) and set(codes) < set(parameters)
    for name, weight in codes.items():
        entry = parameters[name]
        assert (entry["bw"], entry["is_sym"], entry["enc_type"]) == (weight.bits, True, "PER_CHANNEL")
        assert len(entry["scale"]) == len(entry["offset"]) == weight.codes.shape[1]
    mask = activations["attention_mask"]
    low = mask["offset"][0] * mask["scale"][0]
    assert (mask["bw"], mask["is_sym"]) == (16, False) and low == pytest.approx(-100.0, rel=1e-3)
    # The float graph has the numbers that the codes stand for, and runs.
    session = cpu_session(tmp_path / "float.onnx")
    assert session.run(["logits"], calls[0])[0].shape == (1, CHUNK, 128)


def test_scales_by_group_are_multiples_of_those_of_a_channel(tmp_path):
    _, codes, _, _ = with_encodings(tmp_path, group_size=32)
    parameters = {each["name"]: each for each in read_encodings(tmp_path / "float")["param_encodings"]}
    entry, weight = parameters["head.weight"], codes["head.weight"]
    assert (entry["enc_type"], entry["compressed_bw"], entry["bw"], entry["block_size"]) == ("LPBQ", 4, 8, 32)
    multiples = np.array(entry["per_block_int_scale"]).reshape(len(entry["scale"]), -1)  # by channel
    np.testing.assert_array_equal(multiples.T, weight.multiples)


def test_lora_that_is_an_input_is_one_of_the_float_graph_too(tmp_path):
    _, codes, _, _ = with_encodings(tmp_path, as_inputs=is_lora)
    model = onnx.load(tmp_path / "float.onnx")
    lora = {name for name in codes if is_lora(name)}
    assert lora and lora <= {value.name for value in model.graph.input}
    assert not lora & {tensor.name for tensor in model.graph.initializer}


@pytest.mark.slow
def test_a_bundle_has_encodings_of_its_graphs(tmp_path):
    pair = save_pair(tmp_path)
    bundle = export_bundle(pair, tmp_path / "bundle", calibration=requests(), encodings=True, **SETTINGS)
    names = {path.name for path in (bundle / "qairt").iterdir()}
    assert {"vision.onnx", "vision.encodings", "language_0_text_decode.encodings"} <= names
    assert "qairt-converter" in (bundle / "README.md").read_text()
    codes = read_codes(bundle / "qdq" / "language_0_text_prefill.onnx")
    content = read_encodings(bundle / "qairt" / "language_0_text_prefill")
    scales = {each["name"]: each["scale"] for each in content["param_encodings"]}
    assert all(np.allclose(scales[name], weight.scales) for name, weight in codes.items())


@pytest.mark.slow
def test_aimet_reads_the_encodings_and_computes_what_the_quantized_graph_computes(aimet, tmp_path):
    encodings, _, calls, quantized = with_encodings(tmp_path)
    simulation = aimet.QuantizationSimModel(
        onnx.load(tmp_path / "float.onnx"), param_type=aimet.int4, activation_type=aimet.int16,
        quant_scheme="min_max", config_file="htp_v79", providers=["CPUExecutionProvider"],
    )  # fmt: skip
    from aimet_onnx.quantsim import load_encodings_to_sim

    load_encodings_to_sim(simulation, tmp_path / "float.encodings", strict=False)
    found = simulation.session.run(None, calls[0])[0]  # AIMET gives outputs names of its own
    coded = {name: encodings[name].encode(value) for name, value in calls[0].items()}
    expected = encodings["logits"].decode(cpu_session(quantized).run(["logits"], coded)[0])
    assert agreement(found, expected).is_close
    exact = cpu_session(tmp_path / "float.onnx").run(["logits"], calls[0])[0]
    assert not np.allclose(found, exact, atol=1e-5)  # so it did quantize
