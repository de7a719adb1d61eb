"""What a failed `quantize` names: the fewest bits that the measured damage allows, or the next formats in order."""

import math

import pytest

from conversion.quantization.mixed import MixedLinear, bits_per_weight
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.remedy import nearest_bits, what_loses_less
from conversion.verdict import Limits, judge, nothing_measured, of_text_view, with_problems
from hub_cards.verdicts import UNDECIDED

LIMITS = {"answer_loss": 3.0, "perplexity_ratio": 1.15}


def linears(count: int = 20) -> list[MixedLinear]:
    """Of 8,000 weights each, at 4.5, 5 and 8 bits; each damages twice as much as the next."""
    return [
        MixedLinear(f"model.layers.{number}.mlp.down_proj", 8000, ["w4g64", "w4g32", "w8"], [4500, 5000, 8000],
                    [2.0**-number, 0.6 * 2.0**-number, 0.0])
        for number in range(count)
    ]  # fmt: skip


def failed(ratio: float | None = None, lost: float | None = None, view: str = "text") -> dict:
    """A verdict on one view."""
    answers = [] if lost is None else [
        {"difference": -lost / 100, "first": 1.0, "standard_error": 0.0, "count": 400}
    ]  # fmt: skip
    perplexity = [] if ratio is None else [{"of": "plain text", "ratio": ratio, "error": 0.0, "samples": 40}]
    found = judge({view: {"answers": answers, "perplexity": perplexity}}, Limits(), False)
    return found | {"data": [], "limits": LIMITS}


def damage_within(bits: float, found: list[MixedLinear]) -> float:
    from conversion.quantization.budget import spend

    ladders = {one.name: list(zip(one.sizes, one.damages, strict=True)) for one in found}
    places = spend(ladders, bits * sum(one.weights for one in found) / 8)
    return sum(one.damages[places[one.name]] for one in found)


@pytest.mark.parametrize("allowed", [0.9, 0.5, 0.1, 0.001])
def test_the_fewest_bits_leave_no_more_than_the_allowed_damage(allowed):
    found = linears()
    most, bits = allowed * damage_within(bits_per_weight(found), found), nearest_bits(found, allowed)
    assert bits_per_weight(found) < bits <= 8
    assert damage_within(bits, found) <= most
    assert bits - 0.05 <= bits_per_weight(found) or damage_within(bits - 0.05, found) > most


def test_damage_that_stays_at_8_bits_cannot_be_bought_off():
    found = [MixedLinear("model.layers.0.mlp.down_proj", 8000, ["w4g64", "w8"], [4500, 8000], [2.0, 1.0])]
    assert nearest_bits(found, 0.1) is None
    assert what_loses_less(failed(2.0), QuantizationRecipe(rounding="gptq"), found) == (
        "w8a16 for the part with the largest error"
    )


def test_the_worst_comparison_says_how_much_damage_may_stay():
    found = linears()
    half = math.exp(2 * math.log(1.15))  # half of the damage would be at the limit
    by_perplexity = what_loses_less(failed(half), QuantizationRecipe(rounding="gptq"), found)
    assert by_perplexity.startswith(f"--bits-per-weight {nearest_bits(found, 0.5):.2f}, the least that meets")
    by_answers = what_loses_less(failed(1.01, lost=30.0), QuantizationRecipe(rounding="gptq"), found)
    assert by_answers.startswith(f"--bits-per-weight {nearest_bits(found, 0.1):.2f}, ")


def test_without_an_estimate_the_next_formats_are_named_in_order():
    unrelated = with_problems(nothing_measured(), ["the logits of the text view are unrelated"], False)
    assert what_loses_less(unrelated, QuantizationRecipe(), []) == (
        "mixed precision (--calibration, --bits-per-weight 4.5), then with mixed precision (--calibration, "
        "--bits-per-weight 5), then with w8a16 for the part with the largest error"
    )
    assert what_loses_less(unrelated, QuantizationRecipe(rounding="gptq"), linears()) == (
        "--bits-per-weight 5, then with w8a16 for the part with the largest error"
    )
    every = dict.fromkeys(("llm", "lora", "vision_tower", "multi_modal_projector"), "w8a16")
    assert what_loses_less(unrelated, QuantizationRecipe(**every), []) == "w16a16 for the part with the largest error"


ANEW = (
    "a base quantized anew, without --quantized-base, with {way}: the text view is the reused base's, which no option "
    "for a GenieBlue on it changes"
)


@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        (QuantizationRecipe(rounding="gptq"), "--calibration and more --bits-per-weight, then with --llm w8a16"),
        (QuantizationRecipe(llm="w8a16"), "--llm w16a16"),
    ],
    ids=["4 bits", "8 bits"],
)
def test_a_reused_base_whose_text_view_failed_is_to_be_quantized_anew(recipe, way):
    verdict = failed(2.0)
    found = what_loses_less(verdict, recipe, linears(), on_reused_base=of_text_view(verdict))
    assert found == ANEW.format(way=way)


def test_on_a_reused_base_only_the_multimodal_view_says_how_much_damage_may_stay():
    found, half = linears(), math.exp(2 * math.log(1.15))
    verdict = failed(half, view="multimodal")
    undecided = {"of": "plain text", "ratio": 1.15**4, "error": 1.0, "samples": 40}
    verdict["views"]["text"] = {"answers": [], "perplexity": [undecided]}
    reused = of_text_view(verdict)
    assert reused["result"] == UNDECIDED
    way = what_loses_less(verdict, QuantizationRecipe(rounding="gptq"), found, on_reused_base=reused)
    assert way == (
        f"--bits-per-weight {nearest_bits(found, 0.5):.2f}, the least that meets the limits by the measured damage, "
        "then with w8a16 for the part of its own with the largest error"
    )
