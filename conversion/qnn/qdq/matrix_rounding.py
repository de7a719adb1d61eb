"""Rounds one matrix of a decoder: scales that minimize the output error, and GPTQ for the codes.

Pure functions on tensors; matrices are (in, out), as the graphs have them.
"""

import logging

import numpy as np
import torch

from conversion.qnn.qdq.encoding import LARGEST_MULTIPLE, WeightCodes, WeightFormat

logger = logging.getLogger(__name__)
# Fractions of the range that a scale may span. The largest weights of a group of 4-bit codes are worth clipping.
CLIPPING = {4: tuple(1 - 0.05 * step for step in range(9)), 8: (1.0,)}
DAMPING = (0.01, 0.1, 1.0)  # fractions of the mean of the Hessian's diagonal, tried in order
COLUMNS = 128  # whose errors are spread among themselves first, then over all later ones in one product


def round_matrix(weight: torch.Tensor, form: WeightFormat, hessian: torch.Tensor | None = None) -> WeightCodes:
    """Codes of a matrix (in, out), float32; rounded to nearest, or with the Hessian `X^T X` of its inputs by GPTQ.

    Raises `ValueError` for a matrix or a Hessian with NaN or infinity, or for inputs that do not fill whole groups.
    """
    if form.group_size and len(weight) % form.group_size:
        raise ValueError(
            f"{len(weight)} inputs of a matrix are no multiple of the group size {form.group_size}: take 0."
        )
    if not torch.isfinite(weight).all() or (hessian is not None and not torch.isfinite(hessian).all()):
        raise ValueError("A matrix or its inputs contain NaN or infinity: the model is damaged; fetch it again.")
    scales, multiples = fit_scales(weight, form, None if hessian is None else hessian.diagonal())
    steps = scales if multiples is None else (multiples * scales).repeat_interleave(form.group_size, dim=0)
    steps = steps.expand_as(weight)
    largest = form.largest_code
    if hessian is None:
        codes = (weight / steps).round().clamp(-largest, largest)
    else:
        codes = gptq_codes(weight, steps, largest, hessian)
    return WeightCodes(
        codes.to(torch.int8).numpy(),
        scales.numpy(),
        form.bits,
        1,
        None if multiples is None else multiples.to(torch.uint8).numpy(),
    )


def fit_scales(
    weight: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (out,) and, for groups, their multiples (groups, out): those of the least squared error.

    `importance` (in,) weighs the errors of the inputs, all alike by default.
    """
    size = form.group_size or len(weight)
    grouped = weight.unflatten(0, (-1, size))  # (groups, size, out)
    weights = 1.0 if importance is None else importance.unflatten(0, (-1, size))[..., None]
    full = grouped.abs().amax(1) / form.largest_code
    best, least = full, torch.full_like(full, torch.inf)
    for fraction in CLIPPING[form.bits]:
        steps = (full * fraction).clamp(min=1e-8)
        codes = (grouped / steps[:, None]).round_().clamp_(-form.largest_code, form.largest_code)
        error = (codes.mul_(steps[:, None]).sub_(grouped).square_() * weights).sum(1)
        better = error < least
        best, least = torch.where(better, steps, best), torch.where(better, error, least)
    if not form.group_size:
        return best[0].clamp(min=1e-8), None
    scales = (best.amax(0) / LARGEST_MULTIPLE).clamp(min=1e-8)
    return scales, (best / scales).round().clamp(1, LARGEST_MULTIPLE)


def gptq_codes(weight: torch.Tensor, steps: torch.Tensor, largest: int, hessian: torch.Tensor) -> torch.Tensor:
    """Codes for fixed steps (both (in, out)) of which each input's make up for the errors of those before it.

    Frantar et al., "GPTQ" (2023), in the order of falling importance: with `U` the upper Cholesky factor of the
    inverse Hessian, an error `e` of input i adds `-e / U[i, i] * U[i, j]` to each later input j.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    left, steps = weight[order], steps[order]
    codes = torch.empty_like(left)
    for start in range(0, len(left), COLUMNS):
        end = min(start + COLUMNS, len(left))
        errors = torch.empty_like(left[start:end])
        for index in range(start, end):
            codes[index] = (left[index] / steps[index]).round().clamp(-largest, largest)
            errors[index - start] = (left[index] - codes[index] * steps[index]) / factor[index, index]
            left[index + 1 : end].addr_(factor[index, index + 1 : end], errors[index - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes[order.argsort()]


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular `U` with `U^T U = (H + damping)^-1`, float32."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    original, mean = diagonal.clone(), diagonal.mean()
    for damping in DAMPING:
        # Where nothing was ever seen, any code is as good: rounded to nearest.
        diagonal.copy_(torch.where(original > 0, original, mean) + damping * mean if mean > 0 else original + 1.0)
        # The inverse of a Cholesky factor from the last row backwards is the factor of the inverse.
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            eye = torch.eye(len(hessian), dtype=hessian.dtype)
            return torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True)
        logger.warning("The Hessian is not positive definite with a damping of %g: trying a larger one.", damping)
    raise ValueError("The calibration gives no usable Hessian: give more, and more varied, requests.")


def output_error(weight: torch.Tensor, codes: WeightCodes, hessian: torch.Tensor) -> float:
    """The squared error of a matrix's output relative to the output itself, over the inputs of its Hessian."""
    error = torch.from_numpy(np.asarray(codes.decode(), np.float32)) - weight
    return float((error * (hessian @ error)).sum() / (weight * (hessian @ weight)).sum().clamp(min=1e-20))
