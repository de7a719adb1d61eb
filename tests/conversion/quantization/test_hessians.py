"""Calibration block by block: the Hessians of linears, and what passes from block to block."""

import pytest
import torch
from tiny_genieblue import left_pad, prompt, tiles, tiny_genieblue
from tiny_models import PROMISED_FAMILIES, tiny_base, tiny_vision_tower
from torch import nn

from conversion.quantization.hessians import linear_hessians, walk_blocks
from conversion.quantization.rounding import round_weight
from modeling_genieblue.language_adapter_genieblue import find_blocks


def nothing(_index, _block, _hessians):
    pass


def text(count: int = 3, length: int = 16) -> list[dict]:
    """Batches longer than the tiny families' sliding windows of 6 tokens."""
    return [{"input_ids": prompt(length, batch=2, seed=seed)} for seed in range(count)]


@torch.no_grad()
def record_whole_model(view: nn.Module, batches: list[dict], blocks: nn.ModuleList):
    """Inputs of every linear in the blocks, {(index, name): (rows, in_features)}, and the last block's outputs."""
    inputs, outputs, handles = {}, [], []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                rows = inputs.setdefault((index, name), [])
                handles.append(
                    module.register_forward_hook(
                        lambda _module, args, _output, rows=rows: rows.append(args[0].flatten(0, -2).double())
                    )
                )

    def keep_output(_module, _args, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    handles.append(blocks[-1].register_forward_hook(keep_output))
    for batch in batches:
        view(**batch)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows) for key, rows in inputs.items() if rows}, outputs


def assert_same_hessians(found: dict, inputs: dict) -> None:
    assert set(found) == set(inputs)
    for key, rows in inputs.items():
        expected = (2 * rows.T @ rows / len(rows)).float()
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def walk_and_collect(view, batches, path) -> tuple[dict, list[torch.Tensor]]:
    found = {}

    def collect(index, _block, hessians):
        found.update({(index, name): hessian for name, hessian in hessians.items()})

    return found, walk_blocks(view, batches, path, collect)


@pytest.mark.parametrize("family", [*PROMISED_FAMILIES, "gemma2", "cohere"])
def test_a_walk_sees_what_the_model_computes(family):
    base = tiny_base(family)
    path, blocks = find_blocks(base)
    inputs, outputs = record_whole_model(base, text(), blocks)
    found, hidden_states = walk_and_collect(base, text(), path)
    assert_same_hessians(found, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden_states, outputs, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "bluelm", "bluelm-outside"])
def test_a_walk_through_the_multimodal_view(family):
    view = tiny_genieblue(family).eval().multimodal_language_model
    path, blocks = find_blocks(view)
    batches = [{"inputs_embeds": torch.randn(1, 16, 32)} for _ in range(2)]
    inputs, outputs = record_whole_model(view, batches, blocks)
    found, hidden_states = walk_and_collect(view, batches, path)
    assert_same_hessians(found, inputs)
    assert any(".base_layer" in name for _, name in found) and any("modules_to_save" in name for _, name in found)
    assert not any("original_module" in name for _, name in found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden_states, outputs, strict=True))


def test_a_walk_through_the_vision_tower():
    tower = tiny_vision_tower()
    batches = [{"pixel_values": tiles(3)}, {"pixel_values": tiles(1, seed=6)}]
    inputs, outputs = record_whole_model(tower, batches, tower.encoder.layers)
    found, hidden_states = walk_and_collect(tower, batches, "encoder.layers")
    assert_same_hessians(found, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden_states, outputs, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bluelm"])
def test_padding_does_not_count(family):
    base = tiny_base(family)
    path, _ = find_blocks(base)
    rows = [prompt(9, seed=1), prompt(16, seed=2)]
    padded, _ = walk_and_collect(base, [left_pad(rows)], path)
    alone, _ = walk_and_collect(base, [{"input_ids": ids} for ids in rows], path)
    for key, hessian in alone.items():
        torch.testing.assert_close(padded[key], hessian, rtol=1e-3, atol=1e-4 * hessian.abs().max().item())


def test_linears_that_read_one_tensor_share_a_hessian():
    base = tiny_base("llama")
    found, _ = walk_and_collect(base, text(), "model.layers")
    query, key, value, out, gate, up = (
        found[0, name] for name in (*(f"self_attn.{kind}_proj" for kind in "qkvo"), "mlp.gate_proj", "mlp.up_proj")
    )
    assert query is key is value and gate is up
    assert out is not query and gate is not out


def test_later_blocks_see_the_errors_of_earlier_ones():
    base, changed = tiny_base("gemma3_text"), tiny_base("gemma3_text")
    path, blocks = find_blocks(changed)
    untouched, _ = walk_and_collect(base, text(), path)
    found = {}

    def round_and_collect(index, block, hessians):
        found.update({(index, name): hessian for name, hessian in hessians.items()})
        assert block is blocks[index]
        for name in hessians:
            weight = block.get_submodule(name).weight
            weight.data = round_weight(weight, 4, weight.shape[1]).dequantize()

    hidden_states = walk_blocks(changed, text(), path, round_and_collect)
    inputs, outputs = record_whole_model(changed, text(), blocks)  # the model as it is now
    key = (0, "mlp.down_proj")
    # A block's Hessians are of its own weights as they were, its inputs those of the processed blocks before it.
    assert torch.equal(found[0, "self_attn.q_proj"], untouched[0, "self_attn.q_proj"])
    assert torch.equal(found[key], untouched[key])
    for index in range(1, len(blocks)):
        key = (index, "self_attn.q_proj")
        expected = (2 * inputs[key].T @ inputs[key] / len(inputs[key])).float()
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[key], untouched[key], rtol=1e-2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden_states, outputs, strict=True))


def test_a_block_may_be_put_in_the_place_of_another():
    base, other = tiny_base("llama"), tiny_base("llama", seed=1)

    def replace(index, _block, _hessians):
        base.model.layers[index] = other.model.layers[index]

    hidden_states = walk_blocks(base, text(), "model.layers", replace)
    _, outputs = record_whole_model(base, text(), base.model.layers)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hidden_states, outputs, strict=True))


def test_gptq_block_by_block_keeps_more_of_a_model_than_rtn():
    generator = torch.Generator().manual_seed(11)
    # Few kinds of tokens, so that the activations are correlated.
    samples = [{"input_ids": torch.randint(7, 20, (8, 32), generator=generator)} for _ in range(6)]
    errors = {}
    for method in ("rtn", "gptq"):
        base = tiny_base("llama")

        def process(_index, block, hessians, method=method):
            for name, hessian in hessians.items():
                weight = block.get_submodule(name).weight
                rounded = round_weight(weight, 4, weight.shape[1], method=method, hessian=hessian)
                weight.data = rounded.dequantize()

        original = walk_blocks(base, samples, "model.layers", nothing)[-1]
        hidden_states = walk_blocks(base, samples[:-1], "model.layers", process)
        assert len(hidden_states) == 5
        unseen = walk_blocks(base, samples[-1:], "model.layers", nothing)[0]
        errors[method] = ((unseen - original).norm() / original.norm()).item()
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_only_selected_linears_are_measured():
    base = tiny_base("llama")
    seen = []
    walk_blocks(
        base,
        text(1),
        "model.layers",
        lambda index, _block, hessians: seen.append((index, list(hessians))),
        select=lambda index, _block: ["mlp.down_proj", "self_attn.v_proj"] if index == 2 else [],
    )
    assert seen == [(0, []), (1, []), (2, ["mlp.down_proj", "self_attn.v_proj"]), (3, [])]


def test_progress_follows_the_blocks():
    shown = []

    def progress(indices):
        for index in indices:
            yield index
            shown.append(index)

    walk_blocks(tiny_base("llama"), text(1), "model.layers", nothing, progress=progress)
    assert shown == [0, 1, 2, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_a_walk_leaves_nothing_behind(fails):
    base = tiny_base("llama", attention_dropout=0.5)
    base.train()
    base.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in base.named_modules()}
    gradients = []

    def process(index, block, hessians):
        gradients.append(any(hessian.requires_grad for hessian in hessians.values()))
        assert not any(module.training for module in block.modules())
        if fails and index == 1:
            raise RuntimeError("stopped")

    try:
        hidden_states = walk_blocks(base, text(1), "model.layers", process)
        assert not fails and not hidden_states[0].requires_grad
    except RuntimeError:
        assert fails
    assert {name: module.training for name, module in base.named_modules()} == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    assert not any(gradients) and torch.is_grad_enabled()


def test_hessians_of_linears_outside_of_blocks():
    model = tiny_genieblue("llama").eval()
    projector = model.multi_modal_projector
    names = [name for name, module in projector.named_modules() if isinstance(module, nn.Linear)]
    inputs = {name: [] for name in names}
    handles = [
        projector.get_submodule(name).register_forward_hook(
            lambda _module, args, _output, name=name: inputs[name].append(args[0].detach().flatten(0, -2))
        )
        for name in names
    ]

    def run():
        for seed in range(3):
            model.get_image_features(tiles(2, seed=seed))

    found = linear_hessians(projector, run, names)
    assert len(names) == 2 and set(found) == set(names)
    for handle in handles:
        handle.remove()
    for name, rows in inputs.items():
        rows = torch.cat(rows[:3])
        torch.testing.assert_close(found[name], 2 * rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert not any(projector.get_submodule(name)._forward_pre_hooks for name in names)


def test_a_linear_that_no_sample_reaches_is_refused():
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="No calibration sample reached lm_head"):
        linear_hessians(base, lambda: base.model(prompt()), ["lm_head"])


class TwoPaths(nn.Module):
    """A block of two linears: both read the block's input, or each a tensor of its own, as the input decides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states):
        other = hidden_states if hidden_states.sum() > 0 else hidden_states * 3
        return hidden_states + self.first(hidden_states) + self.second(other)


class Chain(nn.Module):
    def __init__(self, blocks, between=lambda hidden_states: hidden_states, order=None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.between, self.order = between, order or range(len(blocks))

    def forward(self, hidden_states):
        for index in self.order:
            hidden_states = self.between(self.blocks[index](hidden_states))
        return hidden_states


def test_linears_that_share_their_input_only_sometimes():
    rows = torch.randn(2, 5, 4)
    batches = [rows[0].abs(), -rows[1].abs()]
    found, _ = walk_and_collect(Chain([TwoPaths()]), [{"hidden_states": batch} for batch in batches], "blocks")
    first, second = torch.cat(batches), torch.cat([batches[0], batches[1] * 3])
    torch.testing.assert_close(found[0, "first"], 2 * first.T @ first / 10)
    torch.testing.assert_close(found[0, "second"], 2 * second.T @ second / 10)


def test_blocks_that_are_called_with_keywords_alone():
    class Keywords(Chain):
        def forward(self, hidden_states):
            for block in self.blocks:
                hidden_states = block(hidden_states=hidden_states)
            return hidden_states

    model = Keywords([TwoPaths(), TwoPaths()])
    rows = torch.randn(5, 4)
    assert torch.equal(walk_blocks(model, [{"hidden_states": rows}], "blocks", nothing)[0], model(rows))


def test_linears_that_read_padding_alone_have_no_hessian():
    padding = {"input_ids": prompt(8), "attention_mask": torch.zeros(1, 8, dtype=torch.int64)}
    found, _ = walk_and_collect(tiny_base("llama"), [padding], "model.layers")
    assert found == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"between": lambda hidden_states: hidden_states * 2}, "changes its hidden states between blocks"),
        ({"order": [0, 0, 1, 2]}, "changes its hidden states between blocks"),
        ({"order": [1, 0, 2]}, "changes its hidden states between blocks"),
        ({"order": [0, 1]}, "ran only 2 of its 3 blocks"),
    ],
)
def test_models_that_are_no_plain_chain_of_blocks_are_refused(options, message):
    chain = Chain([TwoPaths() for _ in range(3)], **options)
    with pytest.raises(ValueError, match=message):
        walk_blocks(chain, [{"hidden_states": torch.randn(5, 4)}], "blocks", nothing)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        walk_blocks(tiny_base("llama"), [], "model.layers", nothing)
