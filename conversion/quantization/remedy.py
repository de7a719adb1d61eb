"""What to try when a quantized model loses too much: the fewest bits that the measured damage allows, or more.

Losses are taken to grow with the damage, in nats per token, that mixed precision estimates for each linear. The loss
that was measured then says how much of that damage may stay.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conversion.quantization.budget import spend
from conversion.quantization.mixed import MixedLinear, bits_per_weight
from conversion.quantization.precision import QuantizationRecipe
from conversion.verdict import VIEWS
from hub_cards.verdicts import FAILED
from modeling_genieblue.view_routing_genieblue import TEXT

STEP = 0.05  # bits per weight between the budgets that are tried
USUAL_BUDGETS = (4.5, 5.0)  # bits per weight, when no estimate is to be had


def what_loses_less(
    verdict: Mapping[str, Any],
    recipe: QuantizationRecipe,
    linears: Sequence[MixedLinear],
    on_reused_base: Mapping[str, Any] | None = None,
) -> str:
    """The way from a failed verdict to one that passes, as the rest of "Less is lost with".

    Args:
        linears: those among which a budget was spent, with their damages; none without calibration samples.
        on_reused_base: the verdict on the text view, if that is a reused base's.
    """
    reuses = on_reused_base is not None
    if reuses and on_reused_base["result"] == FAILED:
        mixed = "--calibration and more --bits-per-weight, then with --llm w8a16"
        more = mixed if recipe.llm == "w4a16" else "--llm w16a16"
        return (
            f"a base quantized anew, without --quantized-base, with {more}: the text view is the "
            "reused base's, which no option for a GenieBlue on it changes"
        )
    ways = []
    if linears:
        allowed = _allowed_share(verdict, [view for view in VIEWS if not (reuses and view == TEXT)])
        nearest = None if allowed is None else nearest_bits(linears, allowed)
        spent = bits_per_weight(linears)
        if nearest is not None:
            ways.append(f"--bits-per-weight {nearest:.2f}, the least that meets the limits by the measured damage")
        elif allowed is None:
            ways += [f"--bits-per-weight {bits:g}" for bits in USUAL_BUDGETS if bits > spent + STEP]
    elif "w4a16" in (recipe.llm, recipe.replicated_blocks):
        ways += [f"mixed precision (--calibration, --bits-per-weight {bits:g})" for bits in USUAL_BUDGETS]
    more = "w8a16" if "w4a16" in recipe.parts().values() else "w16a16"
    part = "the part of its own" if reuses else "the part"
    return ", then with ".join([*ways, f"{more} for {part} with the largest error"])


def nearest_bits(linears: Sequence[MixedLinear], allowed: float) -> float | None:
    """The fewest bits per weight, above those that are spent, that leave at most `allowed` of the damage that is left.

    `None` if not even 8 bits do.
    """
    weights, spent = sum(linear.weights for linear in linears), bits_per_weight(linears)
    most = allowed * sum(linear.damages[linear.chosen] for linear in linears)
    ladders = {linear.name: list(zip(linear.sizes, linear.damages, strict=True)) for linear in linears}
    for step in range(math.floor(spent / STEP) + 1, math.floor(8 / STEP + 1e-9) + 1):
        places = spend(ladders, step * STEP * weights / 8)
        if sum(linear.damages[places[linear.name]] for linear in linears) <= most:
            return round(step * STEP, 2)
    return None


def _allowed_share(verdict: Mapping[str, Any], views: Sequence[str]) -> float | None:
    """The share of the damage at which the worst comparison of these views would be at its limit.

    `None` if no comparison is beyond its limit.
    """
    limits = verdict.get("limits", {})
    shares = []
    for found in (found for view, found in verdict.get("views", {}).items() if view in views):
        for answers in found["answers"][:1]:  # over all samples
            shares.append(_share(-100 * answers["difference"], limits["answer_loss"]))
        for change in found["perplexity"]:
            shares.append(_share(math.log(change["ratio"]), math.log(limits["perplexity_ratio"])))
    return min((share for share in shares if share is not None), default=None)


def _share(loss: float, limit: float) -> float | None:
    return limit / loss if loss > limit else None
