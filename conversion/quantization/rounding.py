"""Rounds one weight matrix to 4 or 8 bits: to nearest, on a searched grid (MSE), or with calibration data (GPTQ).

Pure functions on tensors. Their results do not depend on any kernel: integer codes, scales in their stored dtype, and
integer zero points, so that the codes can be repacked for other kernels without loss.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

ROUNDING_METHODS = ("rtn", "mse", "gptq")
TOP_CODE = {4: 15, 8: 127}  # 4 bits: codes 0..15 around a zero point; 8 bits: -127..127

# Ranges that the search of a grid starts from, as fractions of the full one. Twice as many lower the squared error of
# Gaussian, Laplace and Student-t weights by less than 1 %.
SEARCHED_RANGES = [1 - step / 20 for step in range(11)]
SEARCHED_ELEMENTS = 1 << 18  # weights at a time: several times as fast if they fit in a CPU's cache

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
        method: `rtn` takes the nearest code; `mse` also searches scale and zero point for the smallest squared error
            (4 bits only); `gptq` lets later columns compensate for the errors of earlier ones, weighted by the inputs.
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
        if method == "mse":
            scale, zero = _searched_grid(grouped, dtype)
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


def _searched_grid(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each 4-bit group of weights (out, groups, group_size) with the smallest squared error.

    From each of several ranges, narrower ones clip more, the scale and the integer zero point are fitted once to the
    codes that the range gives, by regression of the weights on them. The full range is among what is compared, so no
    group is worse than rounded to nearest.
    """
    rows = max(1, SEARCHED_ELEMENTS // grouped[0].numel())
    found = [_search_rows(part, dtype) for part in grouped.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_rows(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    full_scale, full_zero = _range_grid(grouped, 4, dtype)
    best_scale, best_zero = full_scale.clone(), full_zero.clone()
    best_loss = torch.full_like(best_scale, torch.inf)
    for fraction in SEARCHED_RANGES:
        grid = _stored_scale(full_scale * fraction, dtype), full_zero
        for is_last in (False, True):
            scale, zero = grid
            codes = _nearest_codes(grouped, scale, zero, 4)
            loss = (grouped - (codes - zero) * scale).square().sum(-1, keepdim=True)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            if not is_last:
                grid = _fitted_grid(grouped, codes, full_scale, dtype)
    return best_scale, best_zero


def _fitted_grid(
    grouped: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale, up to `largest`, and the zero point that represent the weights best by given codes."""
    # weight ≈ slope * code + offset, and the grid is zero at the code -offset / slope.
    code_mean, weight_mean = codes.mean(-1, keepdim=True), grouped.mean(-1, keepdim=True)
    spread = codes - code_mean
    slope = (spread * (grouped - weight_mean)).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
    zero = (code_mean - weight_mean / slope).round().nan_to_num(0.0).clamp(0, TOP_CODE[4])
    steps = codes - zero
    fitted = (steps * grouped).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    # If all weights of a group have the same code, the scale is undetermined.
    usable = torch.isfinite(fitted) & (fitted > 0)
    return _stored_scale(torch.where(usable, fitted, largest).minimum(largest), dtype), zero


def _round_gptq(
    weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), scale and zero point (out, groups, 1), all float32.

    The grids are searched beforehand, because in the order of `compensated_codes` the columns of a group do not lie
    together. Weighting the search by the inputs' mean squares makes it worse: what later columns make up for leaves
    such a grid more often.
    """
    grouped = weight.unflatten(1, (-1, group_size))
    scale, zero = _range_grid(grouped, bits, dtype) if bits == 8 else _searched_grid(grouped, dtype)
    scales, zeros = scale.squeeze(-1).t().contiguous(), zero.squeeze(-1).t().contiguous()  # (groups, out)

    def nearest(index: int, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group = index // group_size
        codes = _nearest_codes(column, scales[group], zeros[group], bits)
        return codes, (codes - zeros[group]) * scales[group]

    return compensated_codes(weight.t(), hessian, nearest).t(), scale, zero


def compensated_codes(
    columns: torch.Tensor, hessian: torch.Tensor, nearest: Callable[[int, torch.Tensor], tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    """Codes (in, out) of a weight's columns (in, out), float32, of which later ones make up for the errors of earlier.

    Args:
        hessian: (in, in), `X^T X` of the linear's inputs, times any factor.
        nearest: (index of an input, its column (out,)) → nearest codes of the column, and the values they stand for.

    Frantar et al., "GPTQ" (2023), algorithm 1, in the order of the inputs' mean squares: with `U` the upper Cholesky
    factor of the inverse Hessian (`H^-1 = U^T U`), an error `e` of column i adds `-e / U[i, i] * U[i, j]` to each
    later column j. This is the change of the later columns that best restores the layer's output: once the earlier
    columns are fixed, only the inverse Hessian of columns i and later counts, and row i of U is its first row, up to a
    factor. The columns that matter most go first, while many others can still make up for them.

    Raises `ValueError` for a Hessian that is not finite or not positive definite.
    """
    hessian = _checked_hessian(hessian, columns.device)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _reversed_cholesky(hessian[order][:, order])
    columns = columns[order].contiguous()  # makes each column of the weight contiguous
    codes = torch.empty_like(columns)
    indices, count = order.tolist(), len(columns)
    for start in range(0, count, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, count)
        # Rows start..end of U: H = R R^T with R upper triangular, and U is the inverse of R.
        eye = torch.eye(end - start, count - start, dtype=factor.dtype, device=factor.device)
        rows = torch.linalg.solve_triangular(factor[start:, start:], eye, upper=True, left=False).float()
        errors = columns.new_empty(end - start, columns.shape[1])
        for index in range(start, end):
            row, column = rows[index - start], columns[index]
            codes[index], values = nearest(indices[index], column)
            # Divided by the diagonal once, so that the updates below are plain products with U.
            errors[index - start] = (column - values) / row[index - start]
            columns[index + 1 : end].addr_(row[index + 1 - start : end - start], errors[index - start], alpha=-1)
        # The block's errors reach all later columns in one product: updating the whole matrix once per column would
        # spend its time moving memory.
        columns[end:].addmm_(rows[:, end - start :].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return in_place


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
        "expected `X^T X` of calibration inputs. Give more, and more varied, samples, or use mse."
    )
