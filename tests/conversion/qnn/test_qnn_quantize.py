"""QDQ graphs: what codes mean, which tensors share them, and what the NPU's emulator makes of them."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_models import tiny_base, tiny_vision_tower
from tiny_qnn import (
    CHUNK,
    CONTEXT,
    SHAPE,
    VARIANTS,
    embeddings_and_logits,
    two_blocks,
    view_of,
)

from conversion.qnn.agreement import agreement
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, cache_names
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.decoder_shape import make_decoder_shape
from conversion.qnn.graphs.float_onnx import OPSET, structure, to_float_onnx
from conversion.qnn.graphs.vision_graph import VisionGraph
from conversion.qnn.npu.compile import CompileError
from conversion.qnn.npu.sessions import cpu_session, npu_session
from conversion.qnn.npu.soc import find_soc
from conversion.qnn.qdq.encoding import Encoding, WeightFormat, round_to_nearest
from conversion.qnn.qdq.files import read_codes
from conversion.qnn.qdq.matrix_rounding import round_matrix
from conversion.qnn.qdq.quantize import encodings_of, quantize_graph, round_weights, tensor_groups, weights_of
from conversion.qnn.qdq.ranges import RangeMeter, measure_ranges
from conversion.qnn.qdq.stored_graphs import save_copy
from modeling_genieblue import GenieBlueForConditionalGeneration

SM8750 = find_soc("sm8750")
# Every family in the view that has everything, and the other view once; two of them among the tests that take seconds.
CASES = [("llama", "text"), ("qwen2", "multimodal")] + [
    pytest.param(variant, "multimodal", marks=pytest.mark.slow) for variant in ("llama", "qwen3", "mistral")
]


def open_on_npu(path):
    return npu_session(path, SM8750)


class FloatView:
    """Both float graphs of a view, for chunks and for single tokens, and their ranges over four requests."""

    def __init__(self, model, view, folder):
        self.model, self.view, self.folder = model, view, folder
        self.shape = make_decoder_shape(model.language_model, CHUNK, CONTEXT)
        graph = DecoderGraph(view_of(model, view), self.shape)
        self.models = {
            tokens: to_float_onnx(graph, graph.example_inputs(tokens, CONTEXT), graph.input_names, graph.output_names)
            for tokens in (CHUNK, 1)
        }
        meter = RangeMeter(self.models[CHUNK], folder)
        for seed in range(4):
            embeddings, _ = embeddings_and_logits(model, view, CONTEXT - CHUNK, seed)
            decoder = ChunkedDecoder(self.shape, lambda _tokens, feeds: meter.run(feeds), CHUNK, CONTEXT)
            decoder.read(embeddings, only_chunks=True)
        self.ranges = meter.ranges


@pytest.fixture(scope="module")
def float_view(tmp_path_factory):
    made = {}

    def make(variant, view):
        if (variant, view) not in made:
            made[variant, view] = FloatView(two_blocks(variant), view, tmp_path_factory.mktemp(view))
        return made[variant, view]

    return make


class CodedView:
    """Both quantized graphs of a view."""

    def __init__(self, source, folder, *, bits=4, group_size=0, cache_bits=16):
        self.shape = source.shape
        blocks = range(self.shape.num_blocks)
        tied = dict(zip(cache_names(blocks, "in"), cache_names(blocks, "out"), strict=True))
        self.encodings = encodings_of(source.models[CHUNK], source.ranges, tied, cache_bits=cache_bits)
        self.codes = round_weights(source.models[1], lambda name: 8 if "lora" in name else bits)
        if group_size:
            form = WeightFormat(bits, group_size)
            matrices = {name: weight for name, (weight, _) in weights_of(source.models[1]).items()}
            self.codes |= {
                name: round_matrix(torch.from_numpy(weight.copy()), form)
                for name, weight in matrices.items()
                if "lora" not in name
            }
        self.paths = {}
        for tokens, model in source.models.items():
            quantized = quantize_graph(model, self.encodings, self.codes, name=f"{source.view}_{tokens}")
            self.paths[tokens] = save_copy(quantized, folder / f"{source.view}_{tokens}.onnx")

    def decoder(self, open_session):
        sessions = {tokens: open_session(path) for tokens, path in self.paths.items()}

        def run(tokens, feeds):
            session = sessions[tokens]
            feeds = {
                name: self.encodings[name].encode(value) if value.dtype == np.float32 else value
                for name, value in feeds.items()
            }
            outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
            return {**outputs, "logits": self.encodings["logits"].decode(outputs["logits"])}

        empty = {name: self.encodings[name].zero for name in cache_names(range(self.shape.num_blocks), "in")}
        return ChunkedDecoder(self.shape, run, CHUNK, CONTEXT, empty=empty)


@pytest.mark.parametrize(("variant", "view"), CASES)
def test_float_onnx_gives_the_logits_of_the_model_over_chunks_and_tokens(float_view, variant, view, tmp_path):
    source = float_view(variant, view)
    model, shape, models = source.model, source.shape, source.models
    assert structure(models[CHUNK]) == structure(models[1])
    sessions = {tokens: cpu_session(save_copy(one, tmp_path / f"{tokens}.onnx")) for tokens, one in models.items()}

    def run(tokens, feeds):
        session = sessions[tokens]
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, dict(feeds)), strict=True))

    embeddings, logits = embeddings_and_logits(model, view, 3 * CHUNK + 5)
    decoder = ChunkedDecoder(shape, run, CHUNK, CONTEXT)
    found = [decoder.read(embeddings[: 2 * CHUNK + 3])]
    found += [decoder.read(embeddings[place : place + 1]) for place in range(2 * CHUNK + 3, len(embeddings))]
    np.testing.assert_allclose(np.concatenate(found), logits, atol=1e-4)


# 16 patches of one tile are where the compiler mixes up rows behind a LayerNorm in three dimensions.
@pytest.mark.parametrize(("side", "count"), [(3, 1), (3, 3), (4, 1), (4, 2), (7, 1)])
def test_the_vision_graph_gives_the_features_of_the_model(side, count, tmp_path):
    tower = tiny_vision_tower(image_size=8 * side)
    model = GenieBlueForConditionalGeneration.from_base(tiny_base("llama", **SHAPE), tower)
    graph = VisionGraph(model)
    exported = to_float_onnx(graph, graph.example_inputs(count), graph.input_names, graph.output_names)
    pixels = torch.randn(count, 3, 8 * side, 8 * side, generator=torch.Generator().manual_seed(5))
    expected = model.get_image_features(pixels).pooler_output.detach().numpy()
    session = cpu_session(save_copy(exported, tmp_path / "vision.onnx"))
    found = session.run(None, {"pixel_values": pixels.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)

    ranges = measure_ranges(exported, [{"pixel_values": pixels.numpy()}], tmp_path)
    encodings = encodings_of(exported, ranges)
    codes = round_weights(exported, lambda _name: 8)
    quantized = quantize_graph(exported, encodings, codes, name="vision")
    path = save_copy(quantized, tmp_path / "quantized.onnx")
    feeds = {"pixel_values": encodings["pixel_values"].encode(pixels.numpy())}
    on_cpu, on_npu = (
        encodings["image_features"].decode(open_session(path).run(None, feeds)[0])
        for open_session in (cpu_session, open_on_npu)
    )
    assert agreement(on_npu, on_cpu).largest_error < 0.005
    assert agreement(on_cpu, expected).cosine > 0.999


@pytest.mark.parametrize(("variant", "view"), CASES)
def test_the_emulator_gives_what_the_quantized_graphs_give_on_the_cpu(float_view, variant, view, tmp_path):
    model = float_view(variant, view).model
    coded = CodedView(float_view(variant, view), tmp_path, bits=8)
    embeddings, logits = embeddings_and_logits(model, view, 2 * CHUNK + 5, seed=99)
    found = {}
    for name, open_session in (("cpu", cpu_session), ("npu", open_on_npu)):
        decoder = coded.decoder(open_session)
        pieces = [decoder.read(embeddings[: 2 * CHUNK + 3])]
        pieces += [decoder.read(embeddings[place : place + 1]) for place in range(2 * CHUNK + 3, len(embeddings))]
        found[name] = np.concatenate(pieces)
    result = agreement(found["npu"], found["cpu"])
    assert result.is_close and result.cosine > 0.9999, result
    assert agreement(found["cpu"], logits).cosine > 0.98


def test_the_emulator_knows_scales_by_group(float_view, tmp_path):
    source = float_view("llama", "text")
    coded = CodedView(source, tmp_path, group_size=32)
    embeddings, _ = embeddings_and_logits(source.model, "text", CHUNK, seed=5)
    found = [coded.decoder(open_session).read(embeddings) for open_session in (open_on_npu, cpu_session)]
    assert agreement(*found).is_close and agreement(*found).cosine > 0.9999
    stored = read_codes(coded.paths[1])
    for name, weight in coded.codes.items():
        assert stored[name].format == weight.format
        assert np.array_equal(stored[name].decode(), weight.decode())
    assert stored["head.weight"].format == WeightFormat(4, 32)


def test_a_cache_of_8_bits_is_half_as_large_and_compiles(float_view, tmp_path):
    source = float_view("llama", "text")
    coded = CodedView(source, tmp_path, cache_bits=8)
    decoder = coded.decoder(cpu_session)
    decoder.read(embeddings_and_logits(source.model, "text", CHUNK)[0])
    assert {array.dtype for array in decoder.cache.values()} == {np.dtype("uint8")}
    npu_session(coded.paths[1], SM8750)


def test_keys_and_values_are_not_rounded_to_8_bits_by_the_compiler(float_view, tmp_path):
    """They would be, as unsigned codes of 16 bits, and nothing but the numbers would tell."""
    source = float_view("llama", "text")
    coded = CodedView(source, tmp_path, bits=8)
    embeddings, _ = embeddings_and_logits(source.model, "text", CHUNK, seed=5)
    found = [coded.decoder(open_session).read(embeddings) for open_session in (open_on_npu, cpu_session)]
    assert agreement(*found).largest_error < 0.004


def test_matrices_have_4_bits_and_lora_8(float_view, tmp_path):
    codes = CodedView(float_view("llama", "multimodal"), tmp_path).codes
    bits = {name.rsplit(".", 1)[-1]: weight.bits for name, weight in codes.items()}
    assert bits == {"weight": 4, "lora_a": 8, "lora_b": 8}
    assert all(np.abs(weight.codes).max() == 7 for weight in codes.values() if weight.bits == 4)


def test_rounding_keeps_every_value_within_half_a_step_of_its_channel():
    weight = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32) * [1, 10, 0.1, 3, 1e-12]
    found = round_to_nearest(weight.astype(np.float32), 4, 1)
    assert found.scales.shape == (5,)
    assert (np.abs(found.decode() - weight) <= found.scales / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint8"])
def test_codes_give_values_back_within_half_a_step_and_zero_exactly(dtype):
    encoding = Encoding.of((-1.5, 4.0), dtype)
    values = np.linspace(-1.5, 4.0, 1001, dtype=np.float32)
    assert np.abs(encoding.decode(encoding.encode(values)) - values).max() <= encoding.scale * 0.501 + 1e-6
    assert encoding.decode(encoding.encode(np.zeros(1))) == 0.0
    assert encoding.encode(np.zeros(1)) == encoding.zero


def test_a_range_that_lies_beside_zero_is_widened_to_it():
    assert Encoding.of((2.0, 4.0)).zero_point == 0
    assert Encoding.of((-4.0, -2.0)).zero_point == 65535
    assert Encoding.of((0.0, 0.0)).encode(np.zeros(3)).tolist() == [0, 0, 0]


def toy_graph():
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
        helper.make_node("Concat", ["y", "z"], ["joined"], axis=0),
        helper.make_node("Softmax", ["joined"], ["out"], axis=-1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "toy",
        [info("x", TensorProto.FLOAT, [4]), info("z", TensorProto.FLOAT, [1, 4])],
        [info("out", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.array([1, 4]), "shape")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_values_that_are_only_moved_keep_their_encoding(tmp_path):
    feeds = {"x": np.array([1, 2, 3, 4], np.float32), "z": np.array([[-8, 0, 0, 1]], np.float32)}
    model = toy_graph()
    ranges = measure_ranges(model, [feeds], tmp_path)
    assert ranges["x"] == (1.0, 4.0) and ranges["joined"] == (-8.0, 4.0)
    encodings = encodings_of(model, ranges)
    assert encodings["x"] == encodings["z"] == encodings["joined"] == Encoding.of((-8.0, 4.0))
    assert encodings["out"] == Encoding.of((0.0, 1.0))
    assert set(tensor_groups(model, {"x": "out"}).values()) == {tensor_groups(model, {"x": "out"})["out"]}


def test_ranges_of_another_graph_are_refused():
    with pytest.raises(ValueError, match="no range for 3 tensors.*a different graph"):
        encodings_of(toy_graph(), {"x": (0.0, 1.0), "z": (0.0, 1.0)})


def test_calibration_without_samples_or_with_broken_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one request"):
        measure_ranges(toy_graph(), [], tmp_path)
    broken = {"x": np.full(4, np.nan, np.float32), "z": np.zeros((1, 4), np.float32)}
    with pytest.raises(ValueError, match="NaN or infinity in x"):
        measure_ranges(toy_graph(), [broken], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_graphs_that_the_compiler_takes_whole(variant, tmp_path):
    for view in ("text", "multimodal"):
        coded = CodedView(FloatView(two_blocks(variant), view, tmp_path), tmp_path)
        for path in coded.paths.values():
            open_on_npu(path)


def test_a_graph_with_an_operator_that_the_npu_lacks_is_refused(tmp_path):
    graph = toy_graph()
    graph.graph.node[2].op_type = "Hardmax"
    onnx.save(graph, tmp_path / "odd.onnx")
    with pytest.raises(CompileError, match="odd.onnx could not be compiled for sm8750"):
        open_on_npu(tmp_path / "odd.onnx")
