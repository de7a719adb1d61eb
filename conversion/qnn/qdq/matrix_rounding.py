"""Rounds one matrix of a decoder: scales that minimize the output error, and GPTQ for the codes.

Pure functions on tensors; matrices are (in, out), as the graphs have them.
"""

import numpy as np
import torch

from conversion.qnn.qdq.encoding import LARGEST_MULTIPLE, WeightCodes, WeightFormat
from conversion.quantization.rounding import compensated_codes

# Fractions of the range that a scale may span. The largest weights of a group of 4-bit codes are worth clipping.
CLIPPING = {4: tuple(1 - 0.05 * step for step in range(9)), 8: (1.0,)}


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

        def nearest(index: int, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = (column / steps[index]).round().clamp(-largest, largest)
            return found, found * steps[index]

        codes = compensated_codes(weight, hessian, nearest)
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


def output_error(weight: torch.Tensor, codes: WeightCodes, hessian: torch.Tensor) -> float:
    """The squared error of a matrix's output relative to the output itself, over the inputs of its Hessian."""
    error = torch.from_numpy(np.asarray(codes.decode(), np.float32)) - weight
    return float((error * (hessian @ error)).sum() / (weight * (hessian @ weight)).sum().clamp(min=1e-20))
