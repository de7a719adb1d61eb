"""Cutting changes of matrices to low rank: the best factors at each rank, and ranks by rank, error and bytes."""

import pytest
import torch

from conversion.low_rank import Spectrum, choose_ranks, factor_change


def matrices(out: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original, change = (torch.randn(out, width, generator=generator) for _ in range(2))
    return original, original + 0.1 * change


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2 * inputs.t() @ inputs / len(inputs)


def spectrum(values: list[float], shape: tuple[int, int] = (4, 4), size: float = 10.0) -> Spectrum:
    return Spectrum(shape, torch.tensor(values), size)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("with_inputs", [False, True], ids=["weights", "outputs"])
def test_full_rank_gives_the_change(shape, with_inputs):
    original, changed = matrices(*shape)
    few = torch.randn(3, shape[1])  # inputs that leave most directions out
    b, a, _ = factor_change(original, changed, hessian_of(few) if with_inputs else None)
    torch.testing.assert_close(b @ a, changed - original, atol=1e-6, rtol=1e-5)


def test_errors_of_a_spectrum_are_those_of_the_weights():
    original, changed = matrices(6, 10)
    b, a, found = factor_change(original, changed)
    errors = [float((changed - original - b[:, :rank] @ a[:rank]).norm() / changed.norm()) for rank in range(7)]
    torch.testing.assert_close(found.errors().float(), torch.tensor(errors), atol=1e-6, rtol=1e-4)


def test_with_inputs_outputs_on_them_are_closer_than_with_the_nearest_weights():
    original, changed = matrices(12, 12)
    inputs = torch.randn(200, 12) * torch.logspace(0, -3, 12)
    cut = {}
    for name, hessian in (("weights", None), ("outputs", hessian_of(inputs))):
        b, a, _ = factor_change(original, changed, hessian)
        cut[name] = float((inputs @ (changed - original - b[:, :3] @ a[:3]).t()).norm())
    assert cut["outputs"] < 0.7 * cut["weights"]


def test_a_matrix_that_did_not_change_has_no_error_at_rank_1():
    original, _ = matrices(5, 7)
    b, a, found = factor_change(original, original)
    assert not (b @ a).any() and found.rank_for(0.01) == 1 and found.lost(1) == 0


def test_rank_is_at_most_the_full_one():
    assert choose_ranks({"narrow": spectrum([2, 1], (2, 9)), "wide": spectrum([3, 2, 1, 1])}, rank=3) == {
        "narrow": 2, "wide": 3
    }  # fmt: skip


def test_error_takes_the_least_rank_that_keeps_it():
    falling = spectrum([4.0, 2.0, 1.0, 0.5])
    for error in (0.3, 0.12, 0.06, 0.01):
        (rank,) = choose_ranks({"a": falling}, error=error).values()
        errors = falling.errors()
        assert errors[rank] <= error and (rank == 1 or errors[rank - 1] > error)


def test_bytes_go_where_they_lower_the_error_most():
    spectra = {"steep": spectrum([5, 0.1, 0.1, 0.1]), "flat": spectrum([3, 3, 3, 3])}
    assert choose_ranks(spectra, max_bytes=5 * 8 * 2) == {"steep": 1, "flat": 4}


def test_no_even_rank_of_the_same_bytes_has_less_error_than_a_budget():
    spectra = {}
    for seed, shape in enumerate([(40, 40), (40, 90), (90, 40)]):
        _, _, spectra[str(seed)] = factor_change(*matrices(*shape, seed))
    for rank in range(2, 40, 6):
        budget = 2 * sum(each.numbers(rank) for each in spectra.values())
        chosen = choose_ranks(spectra, max_bytes=budget)
        squares = {name: each.errors().square() for name, each in spectra.items()}
        assert sum(2 * spectra[name].numbers(each) for name, each in chosen.items()) <= budget
        assert sum(squares[name][each] for name, each in chosen.items()) <= 1.05 * sum(
            each[rank] for each in squares.values()
        )


def test_a_budget_below_rank_1_is_refused_with_what_that_takes():
    with pytest.raises(ValueError, match="100 bytes does not pay for rank 1 in 1 matrices, which takes 160"):
        choose_ranks({"a": spectrum([1.0], (40, 40))}, max_bytes=100)
