"""The supported Snapdragon chips, by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Soc:
    """A chip as the compiler knows it."""

    name: str
    model: int  # the compiler's own number of the chip
    arch: int  # generation of its NPU (Hexagon)
    title: str


# Each was seen to compile a 16-bit graph with int4 weights. The compiler itself accepts any number.
SOCS = {
    soc.name: soc
    for soc in (
        Soc("sm8850", 87, 81, "Snapdragon 8 Elite Gen 5"),
        Soc("sm8750", 69, 79, "Snapdragon 8 Elite"),
        Soc("sm8650", 57, 75, "Snapdragon 8 Gen 3"),
        Soc("sm8550", 43, 73, "Snapdragon 8 Gen 2"),
        Soc("sa8255", 52, 73, "Snapdragon Ride / Cockpit SA8255P"),
        Soc("qcs9100", 77, 73, "Dragonwing IQ-9 QCS9100"),
    )
}


def find_soc(name: str) -> Soc:
    """The chip called `name` (upper or lower case); `ValueError` with the list of known ones."""
    soc = SOCS.get(str(name).strip().lower())
    if soc is None:
        known = ", ".join(f"{soc.name} ({soc.title})" for soc in SOCS.values())
        raise ValueError(f"Unknown SoC {name!r}: choose one of {known}.")
    return soc
