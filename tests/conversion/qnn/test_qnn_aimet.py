"""SeqMSE of AIMET, and `.encodings` that AIMET itself reads."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import onnx
from tiny_qnn import CHUNK, CONTEXT, embeddings_and_logits, requests, save_pair, tiny_model, view_of
from transformers import AutoModelForCausalLM

from conversion.qnn.agreement import agreement
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.export import export_bundle
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import make_decoder_shape
from conversion.qnn.graphs.names import weight_bits
from conversion.qnn.npu.sessions import cpu_session
from conversion.qnn.qdq.aimet_encodings import save_with_encodings
from conversion.qnn.qdq.aimet_rounding import SeqMse, check_aimet_installed, seqmse_scales
from conversion.qnn.qdq.files import read_codes
from conversion.qnn.qdq.language import LanguageSettings, Part, collect_calls, make_float_graph
from conversion.qnn.qdq.quantize import apply_codes, encodings_of, quantize_graph, round_weights
from conversion.qnn.qdq.ranges import measure_ranges
from conversion.qnn.qdq.stored_graphs import ConstantStore, save_copy
from conversion.qnn.verify import verify_bundle

SETTINGS = LanguageSettings(CHUNK, CONTEXT, 16, "constants")


@pytest.fixture
def aimet():
    return pytest.importorskip("aimet_onnx", reason="needs the extra `aimet`")


class Float:
    """The float graph of a view for chunks, and its calls in some requests."""

    def __init__(self, model, view):
        self.shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
        self.model = make_float_graph(DecoderGraph(view_of(model, view), self.shape), SETTINGS, "prefill")
        self.requests = [embeddings_and_logits(model, view, 2 * CHUNK + 3, seed=seed)[0] for seed in range(4)]

    def calls(self, requests):
        return collect_calls(self.model, Part(self.shape, range(self.shape.num_blocks), SETTINGS), requests)


def outliers(model, seed=3):
    """Gives matrices of the base some large weights, for which rounding to nearest wastes its codes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator).pow(-0.4).clamp(max=8))
    return model


def logits(model, calls, folder):
    session = cpu_session(save_copy(model, folder / "run.onnx"))
    return np.concatenate([session.run(["logits"], call)[0] for call in calls])


@pytest.mark.slow
def test_seqmse_loses_less_than_rounding_to_nearest_on_other_requests(aimet, tmp_path):
    source = Float(outliers(tiny_model("llama")), "multimodal")
    calls, others = source.calls(source.requests[:2]), source.calls(source.requests[2:])
    exact = logits(source.model, others, tmp_path)
    seqmse = SeqMse()
    seqmse.fit(source.model, calls, weight_bits)
    errors = {}
    for name, options in (("rtn", {}), ("seqmse", {"rounding": seqmse})):
        rounded = onnx.ModelProto()
        rounded.CopyFrom(source.model)
        apply_codes(rounded, round_weights(source.model, weight_bits, **options))
        errors[name] = float(np.square(logits(rounded, others, tmp_path) - exact).mean())
    assert errors["seqmse"] < 0.8 * errors["rtn"], errors


@pytest.mark.slow
def test_equal_matrices_of_both_views_get_equal_codes(aimet):
    model = tiny_model("llama")
    seqmse, codes = SeqMse(), {}
    for view in ("text", "multimodal"):
        source = Float(model, view)
        seqmse.fit(source.model, source.calls(source.requests[:1]), weight_bits)
        codes[view] = round_weights(source.model, weight_bits, rounding=seqmse)
    copied = [f"blocks.{index}." for index in model.config.replicated_layers]
    for name, weight in codes["text"].items():
        same = np.array_equal(weight.codes, codes["multimodal"][name].codes)
        assert same == (not name.startswith(tuple(copied))), name


@pytest.mark.slow
def test_a_bundle_rounded_by_seqmse_passes_its_checks_against_the_base(aimet, tmp_path):
    pair = save_pair(tmp_path)
    export = {"soc": "sm8750", "chunk_length": CHUNK, "context_length": CONTEXT, "calibration": requests()}
    bundle = export_bundle(pair, tmp_path / "bundle", rounding="seqmse", encodings=True, **export)
    assert Bundle(bundle).metadata["rounding"] == "seqmse"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert [check for check in verify_bundle(bundle, base=base) if not check.ok] == []
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3] *= -1
    failed = [check for check in verify_bundle(bundle, base=base) if not check.ok]
    assert [check.name for check in failed] == ["weights of the text graphs"]
    names = {path.name for path in (bundle / "qairt").iterdir()}
    assert {"vision.onnx", "vision.encodings", "language_0_text_decode.encodings"} <= names
    assert "qairt-converter" in (bundle / "README.md").read_text()
    codes = read_codes(bundle / "qdq" / "language_0_text_prefill.onnx")
    content = read_encodings(bundle / "qairt" / "language_0_text_prefill")
    scales = {each["name"]: each["scale"] for each in content["param_encodings"]}
    assert all(np.allclose(scales[name], weight.scales) for name, weight in codes.items())


def read_encodings(path):
    return json.loads(path.with_suffix(".encodings").read_text())


def with_encodings(folder, **settings):
    """A float graph with its encodings in `folder`, and its QDQ graph beside it."""
    source = Float(tiny_model("llama"), "multimodal")
    codes = round_weights(source.model, weight_bits, **settings)
    apply_codes(source.model, codes)
    calls = source.calls(source.requests)
    encodings = encodings_of(source.model, measure_ranges(source.model, calls, folder))
    quantized = save_copy(quantize_graph(source.model, encodings, codes, name="t"), folder / "quantized.onnx")
    with ConstantStore(folder / "float.data") as store:
        save_with_encodings(source.model, encodings, codes, store, folder / "float.onnx")
    return encodings, codes, calls, quantized


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


def test_lora_that_is_an_input_is_one_of_the_float_graph_too(tmp_path):
    encodings, codes, _, _ = with_encodings(tmp_path, as_inputs=lambda name: ".lora_" in name)
    model = onnx.load(tmp_path / "float.onnx")
    lora = {name for name in codes if ".lora_" in name}
    assert lora and lora <= {value.name for value in model.graph.input}
    assert not lora & {tensor.name for tensor in model.graph.initializer}


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


def test_without_aimet_seqmse_names_the_extra_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aimet_onnx", None)
    with pytest.raises(OSError, match=r"genieblue\[aimet\]"):
        check_aimet_installed()
    with pytest.raises(OSError, match=r"genieblue\[aimet\]"):
        export_bundle(tmp_path / "none", tmp_path / "out", soc="sm8750", calibration=[], rounding="seqmse")
    with pytest.raises(OSError, match=r"genieblue\[aimet\]"):
        seqmse_scales(onnx.ModelProto(), [], weight_bits)
    assert list(tmp_path.iterdir()) == []
