"""Rounds one weight matrix to 4 or 8 bits: to nearest, half-quadratic (HQQ), or with calibration data (GPTQ).

Pure functions on tensors. Their results do not depend on any kernel: integer codes, scales in their stored dtype, and
integer zero points, so that the codes can be repacked for other kernels without loss.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

ROUNDING_METHODS = ("rtn", "hqq", "gptq")
TOP_CODE = {4: 15, 8: 127}  # 4 bits: codes 0..15 around a zero point; 8 bits: -127..127

# HQQ: initial ranges as fractions of the full range, steps from each, and shrinkage strengths in code steps. More of
# any of them lowers the error of Gaussian, Laplace and Student-t weights by less than 1 %.
HQQ_STARTS = (1.0, 0.85, 0.7)
HQQ_ITERATIONS = 10
HQQ_NORM, HQQ_BETA, HQQ_BETA_GROWTH = 0.7, 4.0, 1.01
HQQ_ELEMENTS = 1 << 18  # weights at a time: ten times as fast if they fit in a CPU's cache

GPTQ_BLOCK = 128  # columns whose errors are applied within the block first, then to all later columns at once
GPTQ_DAMPING = (0.01, 0.1, 1.0)  # fractions of the mean of the Hessian's diagonal, tried in order


@dataclass(frozen=True)
class RoundedWeight:
    """A weight (out_features, in_features) as codes, with one scale per row and group of `group_size` columns."""

    codes: torch.Tensor  # (out, in); bits 4: uint8 in 0..15; bits 8: int8 in -127..127
    scale: torch.Tensor  # (out, groups), in the precision it is stored in
    zero_point: torch.Tensor | None  # (out, groups); bits 4: uint8 in 0..15; bits 8: None, the codes are symmetric
    bits: int
    group_size: int  # in_features for one group per row

    def dequantize(self) -> torch.Tensor:
        """The weight that the codes represent: float32 (out, in), `(codes - zero_point) * scale`."""
        steps = self.codes.float().unflatten(1, (-1, self.group_size))
        if self.zero_point is not None:
            steps = steps - self.zero_point.float()[..., None]
        return (steps * self.scale.float()[..., None]).flatten(1)


def round_weight(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    method: str = "rtn",
    dtype: torch.dtype = torch.bfloat16,
    hessian: torch.Tensor | None = None,
) -> RoundedWeight:
    """Rounds `weight` (out_features, in_features) to `bits` per element.

    Args:
        bits: 4 (codes and zero points 0..15, groups along the inputs) or 8 (symmetric, one scale per row).
        group_size: columns that share a scale; a divisor of in_features, at 8 bits in_features itself.
        method: `rtn` takes the nearest code; `hqq` also fits scale and zero point to the bulk of the weights (4 bits
            only); `gptq` lets later columns compensate for the errors of earlier ones, weighted by the inputs.
        dtype: dtype of the scales. Codes are chosen for the scales as stored.
        hessian: (in_features, in_features) for `gptq`: `X^T X` of the linear's calibration inputs, times any factor.

    Raises `ValueError` for weights or a Hessian that are not finite, and for scales that overflow `dtype`.
    """
    weight = weight.detach().float()
    _check_finite(weight)
    if method == "gptq":
        assert hessian is not None
        codes, scale, zero = _round_gptq(weight, bits, group_size, dtype, hessian)
    else:
        grouped = weight.unflatten(1, (-1, group_size))  # (out, groups, group_size)
        if method == "hqq":
            scale, zero = _fit_half_quadratic(grouped, dtype)
        else:
            scale, zero = _range_grid(grouped, bits, dtype)
        codes = _nearest_codes(grouped, scale, zero, bits).flatten(1)
    return RoundedWeight(
        codes=codes.to(torch.uint8 if bits == 4 else torch.int8),
        scale=scale.squeeze(-1).to(dtype),
        zero_point=zero.squeeze(-1).to(torch.uint8) if bits == 4 else None,
        bits=bits,
        group_size=group_size,
    )


def _check_finite(weight: torch.Tensor) -> None:
    # The extremes reveal NaN and infinity, without a mask as large as the weight.
    if not torch.isfinite(torch.stack(weight.aminmax())).all():
        raise ValueError(
            "The weight contains NaN or infinity: the checkpoint is damaged, or overflowed when it was converted to "
            "16 bits. Fetch it again, or load it in bfloat16 or float32."
        )


def _range_grid(grouped: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, (..., 1) each in float32, of a range that spans the weights (..., group_size) and zero."""
    if bits == 8:
        scale = _stored_scale(grouped.abs().amax(-1, keepdim=True) / TOP_CODE[bits], dtype)
        return scale, torch.zeros_like(scale)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Divide each end first, because their difference may overflow.
    scale = _stored_scale(high / TOP_CODE[bits] - low / TOP_CODE[bits], dtype)
    return scale, (-low / scale).round().clamp(0, TOP_CODE[bits])


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` rounded to `dtype`, in float32; never zero, so it can be a divisor."""
    stored = scale.to(dtype).float()
    if torch.isinf(stored).any():
        raise ValueError(
            f"A scale of {scale.max().item():.4g} overflows {dtype}, whose maximum is {torch.finfo(dtype).max:.4g}: "
            "store the scales in torch.bfloat16 or torch.float32."
        )
    # A group of zeros can have any scale; numbers too small for `dtype` become zeros.
    stored[stored == 0] = torch.finfo(dtype).tiny
    return stored


def _nearest_codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as integral floating-point numbers, in the shape of `weight`."""
    lowest = 0 if bits == 4 else -TOP_CODE[bits]
    return (weight / scale).round_().add_(zero).clamp_(lowest, TOP_CODE[bits])


def _fit_half_quadratic(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group by half-quadratic optimisation, or of the plain range if that is better.

    After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): alternately, the part
    of the error that an Lp norm with p < 1 tolerates is set aside, and the grid is fitted to the rest. They fit a
    floating-point zero point with a fixed scale. Here the zero point is an integer, which could hardly move alone, so
    the scale is fitted too, by regression of the weights on their codes. The grid with the smallest squared error of
    all steps is used.
    """
    rows = max(1, HQQ_ELEMENTS // grouped[0].numel())
    fitted = [_fit_rows(part, dtype) for part in grouped.split(rows)]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def _fit_rows(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    top = TOP_CODE[4]
    full_scale, full_zero = _range_grid(grouped, 4, dtype)
    best_scale, best_zero = full_scale.clone(), full_zero.clone()
    best_loss = torch.full_like(best_scale, torch.inf)
    for start in HQQ_STARTS:
        scale, zero, beta = _stored_scale(full_scale * start, dtype), full_zero, HQQ_BETA
        for iteration in range(HQQ_ITERATIONS + 1):
            codes = _nearest_codes(grouped, scale, zero, 4)
            error = grouped - (codes - zero) * scale
            loss = error.square().sum(-1, keepdim=True)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            if iteration == HQQ_ITERATIONS:
                break
            target = grouped - _tolerated(error / scale, beta) * scale
            beta *= HQQ_BETA_GROWTH
            # target ≈ slope * codes + offset, and the grid is zero at the code -offset / slope.
            code_mean, target_mean = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
            spread = codes - code_mean
            slope = (spread * (target - target_mean)).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
            zero = (code_mean - target_mean / slope).round().nan_to_num(0.0).clamp(0, top)
            steps = codes - zero
            fitted = (steps * target).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
            # If all weights of a group have the same code, the scale is undetermined; a fit never leaves the range.
            usable = torch.isfinite(fitted) & (fitted > 0)
            scale = _stored_scale(torch.where(usable, fitted, scale).minimum(full_scale), dtype)
    return best_scale, best_zero


def _tolerated(error: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised soft threshold: the part of `error`, in code steps, that the Lp norm tolerates."""
    size = error.abs()
    return (size - size.clamp(min=1e-6).pow(HQQ_NORM - 1) / beta).clamp_(min=0) * error.sign()


def _round_gptq(
    weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), scale and zero point (out, groups, 1), all float32.

    Frantar et al., "GPTQ" (2023), algorithm 1, without reordering columns: with `U` the upper Cholesky factor of the
    inverse Hessian (`H^-1 = U^T U`), an error `e` of column i adds `-e / U[i, i] * U[i, j]` to each later column j.
    This is the change of the later columns that best restores the layer's output: once the earlier columns are fixed,
    only the inverse Hessian of columns i and later counts, and row i of U is its first row, up to a factor. The grid
    of a 4-bit group is fitted as for `hqq`, which lowers the error by 3 to 5 % compared with the full range.
    """
    factor = _reversed_cholesky(_checked_hessian(hessian, weight.device))
    columns = weight.t().contiguous()  # (in, out): makes each column of the weight contiguous
    codes = torch.empty_like(columns)
    count, groups = len(columns), len(columns) // group_size
    scales = columns.new_empty(groups, columns.shape[1])
    zeros = torch.empty_like(scales)
    for start, end in _column_blocks(count, group_size):
        # Rows start..end of U: H = R R^T with R upper triangular, and U is the inverse of R.
        eye = torch.eye(end - start, count - start, dtype=factor.dtype, device=factor.device)
        rows = torch.linalg.solve_triangular(factor[start:, start:], eye, upper=True, left=False).float()
        errors = columns.new_empty(end - start, columns.shape[1])
        for index in range(start, end):
            group, row = index // group_size, rows[index - start]
            if index % group_size == 0:
                # The group already includes the corrections from earlier columns, so its grid fits what gets rounded.
                weights = columns[index : index + group_size].t().contiguous()[:, None]  # (out, 1, group_size)
                scale, zero = _range_grid(weights, 8, dtype) if bits == 8 else _fit_half_quadratic(weights, dtype)
                scales[group], zeros[group] = scale.flatten(), zero.flatten()
            column = columns[index]
            codes[index] = _nearest_codes(column, scales[group], zeros[group], bits)
            # Divided by the diagonal once, so that the updates below are plain products with U.
            error = (column - (codes[index] - zeros[group]) * scales[group]) / row[index - start]
            errors[index - start] = error
            columns[index + 1 : end].addr_(row[index + 1 - start : end - start], error, alpha=-1)
        # The block's errors reach all later columns in one product: updating the whole matrix once per column would
        # spend its time moving memory.
        columns[end:].addmm_(rows[:, end - start :].t(), errors, alpha=-1)
    return codes.t(), scales.t()[..., None], zeros.t()[..., None]


def _column_blocks(count: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most GPTQ_BLOCK columns, each with complete groups or part of a single group.

    A group must not start inside a block and continue in the next one: its range is computed at its start, when the
    columns of later blocks do not yet include the errors of this block.
    """
    span = group_size * max(1, GPTQ_BLOCK // group_size)
    for start in range(0, count, span):
        stop = min(start + span, count)
        for first in range(start, stop, GPTQ_BLOCK):
            yield first, min(first + GPTQ_BLOCK, stop)


def _checked_hessian(hessian: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A working copy of the Hessian, in float32 on the weight's device; never all zero."""
    if not torch.isfinite(torch.stack(hessian.aminmax())).all():
        raise ValueError(
            "The Hessian contains NaN or infinity: the model overflowed on the calibration samples. Run it in "
            "bfloat16 or float32, or leave out the samples that cause it."
        )
    hessian = hessian.to(device, torch.float32, copy=True)
    diagonal = hessian.diagonal()
    # An input that was always zero in calibration has a zero row and column. Only damping fills its diagonal, so its
    # weights are rounded to nearest independently, instead of being set to zero: other data may use that input.
    if not diagonal.any():
        diagonal.fill_(1.0)
    return hessian


def _reversed_cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular R with `R R^T = H + damping`: a Cholesky factor computed from the last column backwards.

    Its inverse is the upper Cholesky factor of the inverse of H, so that inverse, which would lose precision for a
    badly conditioned H, is never computed.
    """
    diagonal = hessian.diagonal()
    original, mean = diagonal.clone(), diagonal.mean()
    for damping in GPTQ_DAMPING:
        diagonal.copy_(original + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return factor.flip(0, 1)
        logger.warning("The Hessian is not positive definite with a damping of %g: trying a larger one.", damping)
    raise ValueError(
        f"The Hessian is not positive definite, even with {GPTQ_DAMPING[-1]:g} times its mean diagonal added: "
        "expected `X^T X` of calibration inputs. Give more, and more varied, samples, or use hqq."
    )
