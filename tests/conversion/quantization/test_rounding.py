"""Rounding of weight matrices: against quanto, a naive GPTQ, and the errors that each method is expected to have."""

import pytest
import torch
from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight
from torch.distributions import Laplace, StudentT

from conversion.quantization.rounding import ROUNDING_METHODS, RoundedWeight, round_weight

DISTRIBUTIONS = {
    "gaussian": lambda shape: torch.randn(shape) * 0.02,
    "student-t3": lambda shape: StudentT(3.0).sample(shape) * 0.02,
    "laplace": lambda shape: Laplace(0.0, 1.0).sample(shape) * 0.02,
}


def correlated_activations(count: int, features: int, decay: float = 3.0) -> torch.Tensor:
    """Rows with a covariance whose eigenvalues fall over `decay` decades, in no direction of the axes."""
    basis, _ = torch.linalg.qr(torch.randn(features, features))
    return (torch.randn(count, features) * torch.logspace(0, -decay, features).sqrt()) @ basis


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2 * inputs.T @ inputs / len(inputs)


def output_error(weight: torch.Tensor, rounded: RoundedWeight, inputs: torch.Tensor) -> float:
    """Relative L2 error of the linear's outputs."""
    return ((inputs @ (weight - rounded.dequantize()).T).norm() / (inputs @ weight.T).norm()).item()


def weight_error(weight: torch.Tensor, rounded: RoundedWeight) -> float:
    return ((weight - rounded.dequantize()).norm() / weight.norm()).item()


def naive_gptq(weight: torch.Tensor, hessian: torch.Tensor, rounded: RoundedWeight) -> torch.Tensor:
    """GPTQ as Optimal Brain Quantization has it: after each column, the inverse Hessian of those that remain.

    From the largest to the smallest input, on the grid of `rounded`.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    count = weight.shape[1]
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for column in hessian.diagonal().argsort(descending=True).tolist():
        group = column // rounded.group_size
        scale, zero = rounded.scale[:, group].double(), rounded.zero_point[:, group].double()
        code = ((weight[:, column] / scale).round() + zero).clamp(0, 15)
        codes[:, column] = code.to(torch.uint8)
        error = (weight[:, column] - (code - zero) * scale) / inverse[column, column]
        weight -= error[:, None] * inverse[column][None]
        # One step of Gaussian elimination takes the column out of the inverse.
        inverse = inverse - inverse[:, column, None] * inverse[column][None] / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
    return codes


# Groups smaller than a block of columns, that do not divide it, of its size, larger, and one per row.
@pytest.mark.parametrize(("features", "group_size"), [(64, 16), (192, 48), (256, 128), (384, 192), (200, 200)])
def test_gptq_chooses_the_codes_of_a_naive_implementation(features, group_size):
    weight = DISTRIBUTIONS["laplace"]((24, features))
    hessian = hessian_of(correlated_activations(4 * features, features, decay=2.0))
    rounded = round_weight(weight, 4, group_size, method="gptq", hessian=hessian)
    assert torch.equal(rounded.codes, naive_gptq(weight, hessian, rounded))


# Relative L2 error of the outputs at groups of 128. GPTQ's depends on how correlated the activations are.
EXPECTED_ERRORS = {
    "gaussian": {"rtn": 0.100, "mse": 0.096, "gptq": 0.056},
    "student-t3": {"rtn": 0.163, "mse": 0.156, "gptq": 0.094},
    "laplace": {"rtn": 0.131, "mse": 0.125, "gptq": 0.073},
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_of_each_method_on_correlated_activations(distribution):
    features = 1024
    weight = DISTRIBUTIONS[distribution]((128, features))
    inputs = correlated_activations(6144, features)
    seen, unseen = inputs[:4096], inputs[4096:]  # of one covariance; the error is that on the latter
    errors = {
        method: output_error(weight, round_weight(weight, 4, 128, method=method, hessian=hessian_of(seen)), unseen)
        for method in ROUNDING_METHODS
    }
    assert errors == pytest.approx(EXPECTED_ERRORS[distribution], rel=0.08)
    assert errors["gptq"] < 0.7 * errors["rtn"]
    assert errors["mse"] < 0.98 * errors["rtn"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mse_is_never_worse_than_rtn_in_any_group(distribution):
    weight = DISTRIBUTIONS[distribution]((64, 256)) + torch.linspace(-0.05, 0.05, 64)[:, None]  # off-centre groups too
    plain, fitted = (round_weight(weight, 4, 32, method=method).dequantize() for method in ("rtn", "mse"))
    plain, fitted = ((weight - found).unflatten(1, (-1, 32)).norm(dim=-1) for found in (plain, fitted))
    assert (fitted <= plain * (1 + 1e-5)).all()
    assert (fitted < plain).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_has_the_scales_of_quanto(dtype):
    weight = DISTRIBUTIONS["laplace"]((48, 40)).to(dtype)
    scale = AbsmaxOptimizer()(weight, qint8, 0)
    rounded = round_weight(weight, 8, 40, dtype=dtype)
    assert torch.equal(rounded.scale, scale)
    assert rounded.codes.dtype == torch.int8 and rounded.zero_point is None
    theirs = quantize_weight(weight, qint8, 0, scale, optimized=False)
    if dtype == torch.float32:
        assert torch.equal(rounded.codes, theirs._data)
    # quanto divides in 16 bits, which may round the quotient to another code; ours is the nearest one.
    ours, theirs = rounded.codes.float() * scale.float(), theirs._data.float() * scale.float()
    assert ((weight.float() - ours).abs() <= (weight.float() - theirs).abs() + 1e-7).all()


@pytest.mark.parametrize(
    ("dtype", "group_size"),
    [(torch.float32, 16), (torch.float32, 128), (torch.bfloat16, 64), (torch.float16, 64)],
)
def test_rtn_is_within_half_a_step_with_integer_zero_points(dtype, group_size):
    weight = DISTRIBUTIONS["gaussian"]((32, 128)) + torch.linspace(-0.1, 0.1, 32)[:, None]  # one-sided groups too
    rounded = round_weight(weight, 4, group_size, dtype=dtype)
    assert rounded.codes.dtype == rounded.zero_point.dtype == torch.uint8
    assert rounded.scale.dtype == dtype and rounded.scale.shape == rounded.zero_point.shape == (32, 128 // group_size)
    assert rounded.codes.max() <= 15 and rounded.zero_point.max() <= 15
    steps = rounded.scale.float().repeat_interleave(group_size, 1)
    # The ends of a range move by 15 times the rounding of a stored step.
    tolerance = 0.5 + 15 * torch.finfo(dtype).eps
    assert ((rounded.dequantize() - weight).abs() <= tolerance * steps).all()


def test_codes_are_chosen_for_the_scales_as_stored():
    weight = DISTRIBUTIONS["gaussian"]((32, 64))
    rounded = round_weight(weight, 8, 64, dtype=torch.bfloat16)
    nearest = (weight / rounded.scale.float()).round().clamp(-127, 127)
    assert torch.equal(rounded.codes.float(), nearest)
    before_storage = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round()
    assert not torch.equal(nearest, before_storage)


@pytest.mark.parametrize("method", ROUNDING_METHODS)
def test_zero_stays_zero_also_in_groups_of_one_sign(method):
    weight = torch.rand(8, 32) + 0.5
    weight[:4] *= -1
    weight[:, ::5] = 0
    weight[0] = 0
    rounded = round_weight(weight, 4, 16, method=method, hessian=torch.eye(32))
    assert (rounded.dequantize()[weight == 0] == 0).all()
    assert torch.isfinite(rounded.scale).all()


@pytest.mark.parametrize("method", ROUNDING_METHODS)
def test_constant_groups_are_kept(method):
    weight = torch.tensor([0.0, 0.3, -0.3, 1e-30, -1e4])[:, None].repeat(2, 32)
    found = round_weight(weight, 4, 16, method=method, hessian=torch.eye(32)).dequantize()
    torch.testing.assert_close(found, weight, rtol=1e-2, atol=0)


def test_zero_rows_and_tiny_rows_have_finite_codes_at_eight_bits():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-12), torch.ones(16)])
    rounded = round_weight(weight, 8, 16, dtype=torch.float16)
    assert (rounded.scale > 0).all()
    assert torch.equal(rounded.dequantize()[0], torch.zeros(16))
    torch.testing.assert_close(rounded.dequantize(), weight, rtol=1e-3, atol=1e-11)


def test_gptq_at_eight_bits_lowers_the_error_of_rtn():
    weight = DISTRIBUTIONS["gaussian"]((32, 128))
    inputs = correlated_activations(1024, 128)
    plain, compensated = (
        output_error(weight, round_weight(weight, 8, 128, method=method, hessian=hessian_of(inputs)), inputs)
        for method in ("rtn", "gptq")
    )
    assert compensated < 0.8 * plain


def test_gptq_rounds_inputs_that_calibration_never_used_to_nearest():
    weight = DISTRIBUTIONS["gaussian"]((16, 64))
    inputs = correlated_activations(512, 64)
    inputs[:, [0, 5, 40]] = 0
    found = round_weight(weight, 4, 64, method="gptq", hessian=hessian_of(inputs))
    half_steps = found.scale.float() * 0.5
    # The grid may clip a few extremes; all others are nearest codes, although no activation asks for it.
    close = (found.dequantize() - weight)[:, [0, 5, 40]].abs() <= half_steps * 1.001
    assert close.float().mean() > 0.9
    assert torch.isfinite(found.dequantize()).all()


def test_gptq_without_any_activation_is_mse():
    weight = DISTRIBUTIONS["gaussian"]((8, 64))
    silent = round_weight(weight, 4, 32, method="gptq", hessian=torch.zeros(64, 64))
    assert torch.equal(silent.codes, round_weight(weight, 4, 32, method="mse").codes)


def test_gptq_takes_fewer_samples_than_inputs():
    weight = DISTRIBUTIONS["gaussian"]((16, 128))
    inputs = torch.randn(20, 128)
    found = round_weight(weight, 4, 128, method="gptq", hessian=hessian_of(inputs))
    assert output_error(weight, found, inputs) < 0.5 * output_error(weight, round_weight(weight, 4, 128), inputs)


def test_gptq_damps_an_indefinite_hessian_more_before_it_gives_up(caplog):
    weight = DISTRIBUTIONS["gaussian"]((8, 32))
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05
    found = round_weight(weight, 4, 32, method="gptq", hessian=hessian)
    assert "trying a larger one" in caplog.text
    assert weight_error(weight, found) < 0.3
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(ValueError, match="not positive definite.*Give more"):
        round_weight(weight, 4, 32, method="gptq", hessian=hessian)


@pytest.mark.parametrize("method", ROUNDING_METHODS)
def test_inputs_are_left_as_they_are(method):
    weight, hessian = torch.randn(8, 32), hessian_of(torch.randn(64, 32))
    kept = weight.clone(), hessian.clone()
    round_weight(weight, 4, 16, method=method, hessian=hessian)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_a_parameter_in_16_bits_rounds_as_its_values_do():
    weight = torch.nn.Parameter(torch.randn(8, 32).bfloat16())
    rounded = round_weight(weight, 4, 16)
    assert torch.equal(rounded.codes, round_weight(weight.detach().float(), 4, 16).codes)
    assert not rounded.scale.requires_grad


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_overflow_their_precision_are_refused(bits):
    weight = torch.full((2, 16), 1e7)
    with pytest.raises(ValueError, match="overflows torch.float16.*bfloat16"):
        round_weight(weight, bits, 16, dtype=torch.float16)
    assert torch.isfinite(round_weight(weight, bits, 16, dtype=torch.bfloat16).dequantize()).all()


@pytest.mark.parametrize(("method", "value"), [("rtn", float("nan")), ("rtn", float("inf")), ("gptq", float("-inf"))])
def test_weights_that_are_not_finite_are_refused(method, value):
    weight = torch.randn(4, 16)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity: the checkpoint is damaged"):
        round_weight(weight, 4, 16, method=method, hessian=torch.eye(16))


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="Hessian contains NaN"):
        round_weight(torch.randn(4, 16), 4, 16, method="gptq", hessian=torch.full((16, 16), torch.nan))
