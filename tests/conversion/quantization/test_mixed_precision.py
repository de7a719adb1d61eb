"""Mixed precision: what a budget buys, what is recorded of it, and that text stays the quantized base's."""

import json

import pytest
import torch
from tiny_genieblue import prompt, tiny_genieblue
from tiny_quantized import (
    ADAPTER,
    BASE_QMAP,
    BASE_WEIGHTS,
    OWN_WEIGHTS,
    TEXT,
    calibration_samples,
    contents,
    large_pair,
    load,
    load_base,
    own_copy,
    quantize,
)

from conversion.quantization.budget import spend
from conversion.quantization.mixed import Budget, bits_per_weight, draw
from conversion.quantization.sensitivity import balanced_hessian, damage_inputs
from conversion.verification import verify
from conversion.verification.verify import verify_model
from hub_cards.model_folder import parameter_sizes, precision_tags, shown_precisions
from modeling_genieblue.model_files_genieblue import read_json

BITS = 5.5


def mixed(folder, options=None, **budget):
    options = {"budget": Budget(**budget), "samples": calibration_samples(6), **(options or {})}
    return quantize(large_pair(), folder, options, rounding="gptq")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair of mixed precision, and the report on it."""
    folder = tmp_path_factory.mktemp("mixed")
    return folder, mixed(folder, bits_per_weight=BITS)


def formats(folder, is_base=False):
    config = read_json(folder / ("base" if is_base else "genieblue") / "config.json")
    return config["quantization_config" if is_base else "quantization"]["formats"]


# Spending


def test_steps_that_save_most_damage_for_their_cost_come_first():
    ladders = {"one": [(1, 10.0), (2, 4.0), (4, 3.0)], "two": [(1, 5.0), (3, 0.0)]}
    assert [spend(ladders, budget) for budget in (2, 3, 5, 7)] == [
        {"one": 0, "two": 0}, {"one": 1, "two": 0}, {"one": 1, "two": 1}, {"one": 2, "two": 1}
    ]  # fmt: skip


def test_a_place_that_saves_less_for_its_cost_than_the_next_is_passed_over():
    ladder = [(1, 10.0), (2, 9.9), (3, 0.0)]
    assert [spend({"one": ladder}, budget)["one"] for budget in (2, 3)] == [0, 2]


def test_what_no_longer_fits_leaves_room_for_less():
    assert spend({"large": [(1, 9.0), (9, 0.0)], "small": [(1, 1.0), (3, 0.9)]}, 5) == {"large": 0, "small": 1}


def test_nothing_is_spent_on_more_damage():
    assert spend({"one": [(1, 1.0), (2, 2.0)]}, 9) == {"one": 0}


# Damage


def test_damage_is_near_the_divergence_that_an_error_of_a_weight_causes():
    model = tiny_genieblue().language_model
    batches = [{"input_ids": prompt(48, seed=seed)} for seed in range(12)]
    names = [f"model.layers.1.{name}" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")]
    inputs = damage_inputs(model, batches, names)
    for name in names:
        weight = model.get_submodule(name).weight
        error = 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        estimated = float((inputs[name].float() @ error.t()).square().sum())
        found = _divergence(model, batches, weight, error)
        assert 0.4 * found < estimated < 2.5 * found, name


@torch.no_grad()
def _divergence(model, batches, weight, error):
    """Nats per token."""
    before = torch.cat([model(**batch).logits.log_softmax(-1) for batch in batches])
    weight.add_(error)
    after = torch.cat([model(**batch).logits.log_softmax(-1) for batch in batches])
    weight.sub_(error)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_tokens_whose_outputs_matter_more_weigh_more_in_the_hessian():
    inputs = torch.tensor([[3.0, 0.0]])
    balanced = balanced_hessian(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), inputs)
    assert balanced[0, 0] > 1.5 * balanced[1, 1] > 0
    assert torch.equal(balanced_hessian(torch.zeros(2, 2), torch.zeros(1, 2)), torch.zeros(2, 2))


def test_measuring_damage_leaves_the_model_as_it_was():
    model = tiny_genieblue().multimodal_language_model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert any(before.values())
    damage_inputs(
        model, [{"input_ids": TEXT}], [next(name for name, _ in model.named_modules() if name.endswith("base_layer"))]
    )
    after = dict(model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == before
    assert all(parameter.grad is None for parameter in after.values())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


# What is written


def test_a_budget_of_bits_is_kept_and_nearly_spent(made):
    average = bits_per_weight(made[1].mixed)
    assert BITS - 0.3 < average <= BITS
    assert len({linear.format for linear in made[1].mixed}) > 2


def test_both_views_and_the_replicated_blocks_count(made):
    _, report = made
    assert all(linear.damages[0] > 0 for linear in report.mixed)
    assert {linear.is_replicated for linear in report.mixed} == {True, False}
    assert all(linear.damages[-1] < linear.damages[0] / 20 for linear in report.mixed)  # 8 bits


def test_formats_are_recorded_and_those_of_the_files(made):
    folder, report = made
    chosen = {linear.name: linear.format for linear in report.mixed}
    assert formats(folder) == chosen
    assert formats(folder, is_base=True) == {linear.name: linear.format for linear in report.mixed
                                             if not linear.is_replicated}  # fmt: skip
    kinds = read_json(folder / BASE_QMAP)
    base = load_base(folder / "base")
    for name, one in formats(folder, is_base=True).items():
        assert kinds[name]["weights"] == ("qint8" if one == "w8" else "qint4")
        if one != "w8":
            linear = base.get_submodule(name)
            assert (linear.weight._group_size or linear.in_features) == (64 if one == "w4g64" else 32), name


def test_text_equals_the_mixed_base_bit_for_bit(made):
    folder, _ = made
    with torch.no_grad():
        assert torch.equal(load(folder / "genieblue")(TEXT).logits, load_base(folder / "base")(TEXT).logits)


def test_verify_passes_and_names_a_linear_of_another_format(made, tmp_path, monkeypatch):
    folder = own_copy(made[0], tmp_path)
    monkeypatch.setattr(verify, "CHECKS", {"quantization": verify.check_quantization})
    assert [check.ok for check in verify_model(folder / "genieblue")] == [True]
    path = folder / "genieblue/config.json"
    config = json.loads(path.read_text())
    name = next(name for name, one in formats(folder).items() if one == "w8")
    config["quantization"]["formats"][name] = "w4g32"
    path.write_text(json.dumps(config))
    (check,) = verify_model(folder / "genieblue")
    assert not check.ok and name in check.detail


@pytest.mark.parametrize(
    ("base", "copies", "shown"),
    [
        (("w4g64", "w4g32"), ("w4g64",), ("w4a16", "w4a16")),
        (("w8", "w4g32"), ("w8", "w8"), ("mixed", "w8a16")),
        (("w8", "w8"), ("w4g64", "w8"), ("w8a16", "mixed")),
    ],
)
def test_blocks_are_called_by_what_their_linears_have(base, copies, shown):
    formats = {f"model.layers.{number}.q_proj": one for number, one in enumerate(base)}
    formats |= {f"base_model.model.model.layers.{number}.q_proj": one for number, one in enumerate(copies)}
    recorded = {"llm": "w4a16", "replicated_blocks": "w4a16", "lora": "w8a16", "formats": formats, "rounding": "gptq"}
    assert shown_precisions(recorded) == {"llm": shown[0], "replicated_blocks": shown[1], "lora": "w8a16"}
    assert ("mixed-precision" in precision_tags(shown_precisions(recorded))) == ("mixed" in shown)


def test_cards_count_the_formats(made):
    folder, report = made
    for card, own in (("genieblue", report.mixed), ("base", [one for one in report.mixed if not one.is_replicated])):
        text = (folder / card / "README.md").read_text()
        assert f"{sum(linear.format == 'w8' for linear in own)} at 8 bits" in text
        assert "in groups of at most" not in text


def test_a_budget_of_bytes_counts_all_weights_to_the_byte(tmp_path):
    with pytest.raises(ValueError, match="the least is") as refused:
        mixed(tmp_path, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []
    least = int(str(refused.value).split("the least is ")[1].split(", with")[0].replace(",", ""))
    mixed(tmp_path, max_bytes=least)
    files = [tmp_path / name for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS)]
    assert sum(size.bytes for file in files for size in parameter_sizes(file).values()) == least
    assert {"w4g64", "w4g32"} == set(formats(tmp_path).values())


def test_without_figures_the_budget_is_the_size_of_uniform_groups(tmp_path):
    report = mixed(tmp_path / "mixed")
    quantize(large_pair(), tmp_path / "uniform", rounding="gptq")
    sizes = [sum(size.bytes for size in parameter_sizes(tmp_path / one / BASE_WEIGHTS).values())
             + sum(size.bytes for size in parameter_sizes(tmp_path / one / ADAPTER).values())
             for one in ("mixed", "uniform")]  # fmt: skip
    assert 0.97 * sizes[1] < sizes[0] <= sizes[1]
    assert len({linear.format for linear in report.mixed}) > 1


def test_without_figures_a_model_without_4_bits_is_none_of_its_business(tmp_path):
    assert quantize(large_pair(), tmp_path, {"budget": Budget()}, rounding="gptq", llm="w8a16").mixed == []


def test_a_reused_base_keeps_its_formats_and_the_copies_share_the_budget(made, tmp_path):
    report = mixed(tmp_path, {"quantized_base": made[0] / "base"}, bits_per_weight=7)
    assert all(linear.is_replicated for linear in report.mixed) and bits_per_weight(report.mixed) <= 7
    assert formats(tmp_path).items() >= formats(made[0], is_base=True).items()
    assert load(tmp_path / "genieblue").config.quantization["formats"] == formats(tmp_path)


def test_choosing_is_repeatable(made, tmp_path):
    mixed(tmp_path, bits_per_weight=BITS)
    assert formats(tmp_path) == formats(made[0])
    assert contents(tmp_path)[BASE_WEIGHTS] == contents(made[0])[BASE_WEIGHTS]


def test_the_chart_is_a_png(made, tmp_path):
    draw(made[1].mixed, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# Refusals


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits_per_weight": 4.1}, "4.1 bits per weight are not possible: expected 4.48"),
        ({"bits_per_weight": float("nan")}, "nan bits per weight"),
        ({"bits_per_weight": 9}, "9 bits per weight are not possible"),
        ({"bits_per_weight": 5, "max_bytes": 10**9}, "either `bits_per_weight` .* or `max_bytes`"),
    ],
    ids=["too few", "no number", "too many", "both"],
)
def test_impossible_budgets_are_refused(tmp_path, budget, message):
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, **budget)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_needs_linears_of_4_bits_and_samples(tmp_path):
    options = {"budget": Budget(bits_per_weight=5)}
    with pytest.raises(ValueError, match="nothing to choose from"):
        quantize(large_pair(), tmp_path, dict(options), rounding="gptq", llm="w8a16")
    with pytest.raises(ValueError, match="measured on calibration samples, which mse does not use"):
        quantize(large_pair(), tmp_path, dict(options))
