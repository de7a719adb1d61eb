"""Numbers for readers: short ones with a unit, and counts with their noun."""


def short_count(number: int) -> str:
    """A count in B, M or k."""
    return _scaled(number, ((10**9, " B"), (10**6, " M"), (10**3, " k")))


def short_bytes(number: int) -> str:
    """A size in GB, MB, kB (powers of 1000) or bytes."""
    return _scaled(number, ((10**9, " GB"), (10**6, " MB"), (10**3, " kB")), smallest=" bytes")


def bits_each(parameters: int, number_of_bytes: int) -> str:
    """Bits per parameter on disk, including scales and weights kept at 16 bits; a dash without parameters."""
    return f"{8 * number_of_bytes / parameters:.2f}" if parameters else "–"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 step`, `2 steps`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def _scaled(number: int, units: tuple[tuple[int, str], ...], smallest: str = "") -> str:
    for factor, unit in units:
        if number >= factor:
            return f"{number / factor:.2f}{unit}"
    return f"{number}{smallest}"
