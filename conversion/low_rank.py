"""The change of a weight matrix as a product of low rank: its SVD, and how many ranks to keep of many matrices."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modeling_genieblue.vlm_language_genieblue import balanced

# Of the mean of a Hessian's diagonal, added to it: directions that no calibration sample has still count a little.
DAMPING = 0.01
BYTES_OF_HEADER = 140  # of a safetensors file for each tensor, at most, without the tensor's name


@dataclass(frozen=True)
class Spectrum:
    """How the error of a matrix falls with the rank at which its change is cut.

    Attributes:
        shape: (out_features, in_features).
        singular_values: of the change, in descending order; of its outputs if there was calibration.
        size: Frobenius norm of the whole changed matrix, or of its outputs.
    """

    shape: tuple[int, int]
    singular_values: torch.Tensor
    size: float

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost."""
        return min(self.shape)

    def errors(self) -> torch.Tensor:
        """Error of the matrix (of its outputs), relative to it, at ranks 0 … `full_rank`."""
        squares = self.singular_values.double().square()
        lost = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return lost.sqrt() / max(self.size, 1e-30)

    def lost(self, rank: int) -> float:
        """Share of the change that is lost at `rank`: the error relative to that at rank 0."""
        errors = self.errors()
        return float(errors[rank] / errors[0]) if errors[0] else 0.0

    def rank_for(self, error: float) -> int:
        """The smallest rank with at most this error, at least 1."""
        return max(1, int((self.errors() > error).sum()))

    def numbers(self, rank: int) -> int:
        """Numbers in both factors."""
        return rank * sum(self.shape)


@torch.no_grad()
def factor_change(
    original: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, Spectrum]:
    """Factors B (out, full rank) and A (full rank, in) of `changed - original`, of which the first ranks matter most.

    At each rank `B[:, :rank] @ A[:rank]` is the best of all matrices of that rank: for the weights or, with the
    Hessian `2 X^T X / n` of the inputs, for the outputs on them. Both factors are float32 and of equal size.
    """
    changed = changed.float()
    change = changed - original.float()
    if hessian is None:
        root = None
        basis, values, _ = torch.linalg.svd(change, full_matrices=False)
    else:
        hessian = hessian.double()
        damping = DAMPING * float(hessian.diagonal().mean()) or 1.0
        hessian = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
        root = torch.linalg.cholesky(hessian).float()
        basis, values, _ = torch.linalg.svd(change @ root, full_matrices=False)
    size = float((changed if root is None else changed @ root).norm())
    return *balanced(basis, change), Spectrum((change.shape[0], change.shape[1]), values, size)


def check_rank_choice(rank: int | None, error: float | None, max_bytes: int | None) -> None:
    """`ValueError` for more than one choice of ranks, or one out of range."""
    given = [name for name, value in (("rank", rank), ("error", error), ("max_bytes", max_bytes)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each choose the ranks: give only one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` is {rank}: expected at least 1.")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"`error` is {error}: expected a relative error between 0 and 1, such as 0.02.")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"`max_bytes` is {max_bytes}: expected a positive number.")


def choose_ranks(
    spectra: Mapping[str, Spectrum],
    *,
    rank: int | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    bytes_per_number: int = 2,
) -> dict[str, int]:
    """The rank of each matrix: a fixed one, the least with at most this `error`, or what `max_bytes` pay for.

    Bytes are spent where they lower the sum of the matrices' squared errors most. Without a choice all is kept. Every
    matrix gets at least rank 1. Raises `ValueError` for a budget that does not pay for that.
    """
    if rank is not None:
        return {name: min(rank, spectrum.full_rank) for name, spectrum in spectra.items()}
    if error is not None:
        return {name: spectrum.rank_for(error) for name, spectrum in spectra.items()}
    if max_bytes is None or not spectra:
        return {name: spectrum.full_rank for name, spectrum in spectra.items()}
    ranks = dict.fromkeys(spectra, 1)
    cost = {name: spectrum.numbers(1) * bytes_per_number for name, spectrum in spectra.items()}
    left = max_bytes - sum(cost.values())
    if left < 0:
        raise ValueError(
            f"A budget of {max_bytes:,} bytes does not pay for rank 1 in {len(spectra)} matrices, which takes "
            f"{sum(cost.values()):,}: give more."
        )
    squares = [spectrum.errors().square() for spectrum in spectra.values()]
    gains = torch.cat([each[1:-1] - each[2:] for each in squares])  # of one rank more, matrix by matrix
    owners = torch.repeat_interleave(torch.arange(len(squares)), torch.tensor([len(each) - 2 for each in squares]))
    costs = torch.tensor(list(cost.values()))[owners]
    # A matrix's gains fall with its rank, so its steps come in order; sorting keeps the order of equal ones.
    steps = (gains / costs).argsort(descending=True, stable=True)
    steps = steps[gains[steps] > 0]
    names = list(spectra)
    while len(steps := steps[costs[steps] <= left]):
        spent = costs[steps].cumsum(0)
        taken = int((spent <= left).sum())
        left -= int(spent[taken - 1])
        for owner, count in enumerate(owners[steps[:taken]].bincount(minlength=len(names)).tolist()):
            ranks[names[owner]] += count
        steps = steps[taken:]  # the next one is too dear, but perhaps not all behind it
    return ranks
