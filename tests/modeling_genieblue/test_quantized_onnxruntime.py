"""Linears on ONNX Runtime: no code is lost, the error is that of int8 activations, shared modules stay shared."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from modeling_genieblue import quantized_onnxruntime_genieblue as backend
from modeling_genieblue.quantized_onnxruntime_genieblue import (
    SIBLINGS,
    OnnxRuntimeLinear,
    block_size_of,
    use_onnxruntime,
)

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

FLOAT32_ACTIVATIONS = 1  # accuracy level
INT8_ERROR = 0.02  # relative L2 error that rounding the activations may cause


class QuantizedLinear(nn.Module):
    """A linear with random codes: 4 bits with zero points, or 8 bits and symmetric with one scale per row."""

    def __init__(
        self, in_features=64, out_features=48, *, bits=4, group_size=32, bias=False, dtype=torch.float32, seed=0
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        groups = -(-in_features // group_size)
        low, high, kind = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
        self.codes = torch.randint(low, high, (out_features, in_features), generator=generator).to(kind)
        self.scale = (torch.rand(out_features, groups, generator=generator) + 0.5).to(dtype) / 16
        self.zero_point = None
        if bits == 4:
            self.zero_point = torch.randint(4, 12, (out_features, groups), generator=generator).to(torch.uint8)
        self.bias = torch.randn(out_features, generator=generator).to(dtype) if bias else None
        self.bits, self.group_size = bits, group_size

    @property
    def weight(self):
        group_of_input = torch.arange(self.codes.shape[1]) // self.group_size
        zero_point = 0 if self.zero_point is None else self.zero_point[:, group_of_input].double()
        return ((self.codes.double() - zero_point) * self.scale[:, group_of_input].double()).to(self.scale.dtype)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def extract(module):
    if isinstance(module, QuantizedLinear):
        return module.codes, module.scale, module.zero_point, module.bits, module.group_size
    return None


def on_onnxruntime(source):
    return OnnxRuntimeLinear(
        source.codes,
        source.scale,
        source.zero_point,
        source.bias,
        bits=source.bits,
        group_size=source.group_size,
        dtype=source.scale.dtype,
    )


def activations(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(result, expected):
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


SHAPES = [
    pytest.param(dict(in_features=256, group_size=32), id="4bit-groups-of-32"),
    pytest.param(dict(in_features=192, group_size=64), id="4bit-groups-of-64"),
    pytest.param(dict(in_features=192, group_size=96), id="4bit-groups-of-96"),
    pytest.param(dict(in_features=256, group_size=128), id="4bit-groups-of-128"),
    pytest.param(dict(in_features=512, group_size=256), id="4bit-groups-of-256"),
    pytest.param(dict(in_features=320, group_size=64), id="4bit-odd-number-of-blocks"),
    pytest.param(dict(in_features=320, group_size=320), id="4bit-one-group-per-row"),
    pytest.param(dict(in_features=300, group_size=300), id="4bit-last-block-not-full"),
    pytest.param(dict(in_features=320, group_size=128), id="4bit-last-group-not-full"),
    pytest.param(dict(in_features=320, group_size=320, bits=8), id="8bit"),
    pytest.param(dict(in_features=588, out_features=33, group_size=588, bits=8), id="8bit-588-inputs"),
    pytest.param(dict(in_features=4304, group_size=4304, bits=8), id="8bit-4304-inputs"),
    pytest.param(dict(in_features=4, out_features=7, group_size=4, bits=8), id="8bit-4-inputs"),
]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_code_is_lost_by_repacking(monkeypatch, shape, tokens):
    monkeypatch.setattr(backend, "ACCURACY_LEVEL", FLOAT32_ACTIVATIONS)
    source = QuantizedLinear(**shape, bias=True)
    x = activations(tokens, shape["in_features"])
    assert error(on_onnxruntime(source)(x), source(x.double())) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_differs_from_the_dequantized_weight_by_int8_activations_only(shape, tokens):
    source = QuantizedLinear(**shape, bias=True)
    x = activations(tokens, shape["in_features"])
    measured = error(on_onnxruntime(source)(x), source(x))
    assert 0 < measured < INT8_ERROR


def test_extreme_8bit_codes_do_not_saturate():
    source = QuantizedLinear(256, 32, bits=8, group_size=256)
    source.codes[:16], source.codes[16:] = -128, 127
    x = torch.ones(2, 256)
    assert error(on_onnxruntime(source)(x), source(x)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2, 3), (2, 1, 4), (0,), (2, 0)])
def test_batch_shape_and_precision_are_those_of_the_input(dtype, batch):
    source = QuantizedLinear(64, 48, bias=True)
    x = activations(*batch, 64, dtype=dtype)
    result = on_onnxruntime(source)(x)
    assert (result.shape, result.dtype) == ((*batch, 48), dtype)
    if x.numel():
        assert error(result, source(x.float())) < INT8_ERROR


def test_one_token_alone_equals_the_same_token_among_others():
    linear = on_onnxruntime(QuantizedLinear(256, 48, group_size=128))
    x = activations(4, 256)
    alone = torch.cat([linear(token[None]) for token in x])
    torch.testing.assert_close(linear(x), alone, rtol=1e-5, atol=1e-5)


def test_input_that_is_not_contiguous():
    linear = on_onnxruntime(QuantizedLinear(64, 48))
    x = activations(64, 6)
    assert torch.equal(linear(x.t()), linear(x.t().contiguous()))
    assert torch.equal(linear(x[:, :1].t()), linear(x[:, :1].t().contiguous()))


def test_results_are_memory_of_their_own():
    linear = on_onnxruntime(QuantizedLinear(64, 48))
    first = linear(activations(1, 64))
    kept = first.clone()
    linear(activations(1, 64, seed=2)).add_(1)
    assert torch.equal(first, kept)


def test_works_in_and_after_inference_mode():
    linear = on_onnxruntime(QuantizedLinear(64, 48))
    x = activations(1, 64)
    with torch.inference_mode():
        inside = linear(x).clone()
    assert torch.equal(linear(x), inside)


def test_reads_like_a_linear():
    linear = on_onnxruntime(QuantizedLinear(64, 48, dtype=torch.bfloat16))
    assert (linear.in_features, linear.out_features) == (64, 48)
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.device.type) == ((48, 64), torch.bfloat16, "cpu")
    assert not list(linear.parameters()) and "in_features=64, out_features=48" in repr(linear)


def test_two_threads_at_once():
    first, second, third = sources = [QuantizedLinear(256, 96, seed=seed) for seed in range(3)]
    tree = nn.Module()
    tree.q_proj, tree.k_proj, tree.v_proj = sources
    use_onnxruntime(tree, extract)
    problems = []

    def work(seed):
        for step in range(100):
            x = activations(1 + step % 2, 256, seed=100 * seed + step)
            for name, source in zip(("q_proj", "k_proj", "v_proj"), (first, second, third), strict=True):
                if error(getattr(tree, name)(x), source(x)) > INT8_ERROR:
                    problems.append((seed, step, name))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


# What it refuses


def test_gradients_are_refused():
    linear = on_onnxruntime(QuantizedLinear())
    x = activations(2, 64).requires_grad_()
    with pytest.raises(ValueError, match="inference only"):
        linear(x)
    with torch.no_grad():
        assert not linear(x).requires_grad


def test_input_of_another_width_or_device_is_refused():
    linear = on_onnxruntime(QuantizedLinear())
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 64\)"):
        linear(activations(2, 32))
    with pytest.raises(ValueError, match="on meta"):
        linear(torch.empty(2, 64, device="meta"))


def test_saving_and_pickling_are_refused():
    linear = on_onnxruntime(QuantizedLinear())
    with pytest.raises(ValueError, match="cannot be saved"):
        nn.Sequential(linear).state_dict()
    with pytest.raises(ValueError, match="cannot be pickled"):
        pickle.dumps(linear)


def test_a_deep_copy_is_the_same_object():
    model = nn.Sequential(on_onnxruntime(QuantizedLinear()))
    assert copy.deepcopy(model)[0] is model[0]


@pytest.mark.parametrize(
    ("in_features", "bits", "group_size", "block"),
    [
        (256, 4, 128, 128),
        (1024, 4, 256, 128),
        (192, 4, 96, 32),
        (4304, 4, 16, 16),
        (4304, 8, 4304, 128),
        (4, 8, 4, 16),
        (100, 4, 100, 128),
        (96, 4, 24, None),
        (96, 4, 8, None),
        (128, 2, 128, None),
    ],
)
def test_blocks_are_powers_of_two_that_divide_the_group(in_features, bits, group_size, block):
    assert block_size_of(in_features, bits, group_size) == block


def test_groups_without_a_block_are_refused():
    source = QuantizedLinear(96, 48, group_size=24)
    with pytest.raises(ValueError, match="groups of 24"):
        on_onnxruntime(source)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(scale=torch.ones(48, 3)), r"scale has shape \(48, 3\), expected \(48, 2\)"),
        (dict(zero_point=torch.ones(48, 1, dtype=torch.uint8)), "zero_point has shape"),
        (dict(zero_point=None), "int8 codes without"),
        (dict(zero_point=torch.ones(48, 2)), "zero points torch.float32"),
        (dict(codes=torch.full((48, 64), 16, dtype=torch.uint8)), r"codes of 4 bits must lie in 0\.\.15"),
    ],
    ids=["scale-shape", "zero-point-shape", "no-zero-point", "float-zero-point", "code-out-of-range"],
)
def test_pieces_that_do_not_fit_are_refused(changed, message):
    source = QuantizedLinear()
    for name, value in changed.items():
        setattr(source, name, value)
    with pytest.raises(ValueError, match=message):
        on_onnxruntime(source)


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(backend, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"genieblue\[onnxruntime\]"):
        on_onnxruntime(QuantizedLinear())
    with pytest.raises(ValueError, match=r"genieblue\[onnxruntime\]"):
        use_onnxruntime(nn.Sequential(QuantizedLinear()), extract)


# Whole trees


class Block(nn.Module):
    """Siblings of attention and feed-forward, and linears that stand alone, over `hidden` features."""

    def __init__(self, hidden=64, **options):
        super().__init__()
        sizes = dict(q_proj=hidden, k_proj=hidden // 2, v_proj=hidden // 2, gate_proj=96, up_proj=96, o_proj=hidden)
        for seed, (name, size) in enumerate(sizes.items()):
            setattr(self, name, QuantizedLinear(hidden, size, bias=name == "k_proj", seed=seed, **options))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x):
        x = self.norm(x)
        return [getattr(self, name)(x) for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj")]


class Wrapper(nn.Module):
    """A LoRA linear, as far as the place of its base layer goes."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x).add_(1)


def wrapped(block):
    """A second block over the same linears, each inside a wrapper."""
    second = copy.deepcopy(block, {id(child): Wrapper(child) for child in block.children()})
    second.norm = block.norm
    return second


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
def test_each_quantized_linear_of_a_tree_is_replaced_and_computes_the_same(tokens):
    block = Block()
    x = activations(1, tokens, 64)
    expected = block(x)
    assert use_onnxruntime(block, extract) == 6
    assert all(isinstance(child, OnnxRuntimeLinear) for name, child in block.named_children() if name != "norm")
    for result, wanted in zip(block(x), expected, strict=True):
        assert result.is_contiguous() and error(result, wanted) < INT8_ERROR


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
def test_siblings_compute_once_and_exactly_what_each_computes_alone(tokens):
    block = Block()
    alone = {name: on_onnxruntime(getattr(block, name)) for names in SIBLINGS for name in names}
    use_onnxruntime(block, extract)
    x = activations(1, tokens, 64)
    for names in SIBLINGS:
        product, _ = getattr(block, names[0]).product
        runs, compute = [], product._compute
        product._compute = lambda given, runs=runs, compute=compute: runs.append(given) or compute(given)
        for name in names:
            torch.testing.assert_close(getattr(block, name)(x), alone[name](x), rtol=1e-6, atol=1e-6)
        assert len(runs) == 1


@torch.no_grad()
def test_siblings_do_not_rely_on_their_order():
    block = Block()
    x, other = activations(1, 2, 64), activations(1, 2, 64, seed=2)
    use_onnxruntime(block, extract)
    wanted = {name: getattr(block, name)(x).clone() for name in SIBLINGS[0]}
    block.q_proj(other)
    for name in ("v_proj", "k_proj", "k_proj", "q_proj", "v_proj", "k_proj"):
        result = getattr(block, name)(x)
        assert torch.equal(result, wanted[name])
        result.add_(1)  # as LoRA does
    changed = x.clone()
    block.q_proj(changed)
    changed.copy_(other)
    assert torch.equal(block.q_proj(changed), block.q_proj(other))


@torch.no_grad()
def test_siblings_of_different_precision_stay_apart():
    block = Block()
    block.k_proj = QuantizedLinear(64, 32, bits=8, group_size=64)
    x = activations(1, 2, 64)
    expected = block(x)
    assert use_onnxruntime(block, extract) == 6
    assert all(error(result, wanted) < INT8_ERROR for result, wanted in zip(block(x), expected, strict=True))


@torch.no_grad()
def test_a_linear_in_two_views_becomes_one_object():
    text = Block()
    multimodal = wrapped(text)
    x = activations(1, 1, 64)
    expected = multimodal(x)
    assert use_onnxruntime(nn.ModuleList([text, multimodal]), extract) == 12
    assert multimodal.q_proj.base_layer is text.q_proj and multimodal.o_proj.base_layer is text.o_proj
    assert all(error(result, wanted) < INT8_ERROR for result, wanted in zip(multimodal(x), expected, strict=True))


def test_originals_are_freed():
    block = Block()
    originals = [weakref.ref(child) for name, child in block.named_children() if name != "norm"]
    use_onnxruntime(block, extract)
    gc.collect()
    assert len(originals) == 6 and not any(original() for original in originals)


def test_what_the_operator_cannot_take_stays_and_is_logged(caplog):
    tree = nn.Sequential(QuantizedLinear(96, 48, group_size=24), QuantizedLinear(96, 48), nn.Linear(4, 4))
    assert use_onnxruntime(tree, extract) == 1
    assert [type(module) for module in tree] == [QuantizedLinear, OnnxRuntimeLinear, nn.Linear]
    assert "(48, 96) at 4 bits in groups of 24" in caplog.text
