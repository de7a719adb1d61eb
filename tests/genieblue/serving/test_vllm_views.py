"""Two views in one pass: each token runs the modules of its view, and what is not changed is shared."""

import pytest
import torch
from torch import nn

from genieblue.serving.vllm.views import MARK, CopiedModule, LoraLinear, Rows, second_tree

POSITIONS = {
    "texts": torch.tensor([3, 4, 0]),
    "images": torch.tensor([3, 4, 0]) + MARK,
    "both": torch.tensor([3, 4, 0]) + torch.tensor([0, MARK, 0]),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_marks_are_taken_off_positions(kind):
    positions, has_images = Rows().read_marks(POSITIONS[kind])
    assert positions.tolist() == [3, 4, 0] and has_images == (kind != "texts")


def test_positions_of_a_request_tell_its_view_for_as_long_as_the_engine_has_it():
    rows = Rows()
    text, pictured = rows.positions_of_request(3, False), rows.positions_of_request(2, True)
    assert text[0].tolist() == [[0, 1, 2]] * 3 and text[1] == 0
    assert pictured[0].tolist() == [[MARK, MARK + 1]] * 3 and pictured[1] == MARK
    assert rows.read(POSITIONS["both"].clone())[1]
    del pictured
    assert not rows.read(POSITIONS["both"].clone())[1]


def test_texts_after_images_have_their_positions_read_by_no_device_and_left_in_their_place(monkeypatch):
    rows, positions = Rows(), POSITIONS["both"].clone()  # as a pass that is padded with the rows of an earlier one
    rows.positions_of_request(2, True)
    monkeypatch.setattr(rows, "read_marks", None)
    found, _ = rows.read(positions)
    assert found.tolist() == [3, 4, 0] and found.data_ptr() == positions.data_ptr()


@pytest.mark.parametrize(("kind", "copied"), [("images", [True, True, True]), ("both", [False, True, False])])
def test_each_row_runs_the_module_of_its_view(kind, copied):
    rows = Rows()
    rows.read_marks(POSITIONS[kind])
    original, copy, x = nn.Linear(4, 5), nn.Linear(4, 5), torch.randn(3, 4)
    expected = torch.where(torch.tensor(copied)[:, None], copy(x), original(x))
    torch.testing.assert_close(CopiedModule(original, copy, rows)(x), expected)


@pytest.mark.parametrize(("kind", "adapted"), [("images", [1, 1, 1]), ("both", [0, 1, 0])])
def test_lora_is_added_to_rows_of_the_multimodal_view(kind, adapted):
    rows = Rows()
    rows.read_marks(POSITIONS[kind])
    linear, a, b, x = nn.Linear(4, 5), torch.randn(2, 4), torch.randn(5, 2), torch.randn(3, 4)
    expected = linear(x) + torch.tensor(adapted)[:, None] * (x @ a.T @ b.T)
    torch.testing.assert_close(LoraLinear(linear, a, b, rows, None)(x), expected)


def test_results_that_are_tuples_keep_their_form():
    rows = Rows()
    rows.read_marks(POSITIONS["both"])
    first, second = rows.run(lambda x, y: (x, None), lambda x, y: (y, None), torch.zeros(3, 2), torch.ones(3, 2))
    assert first[:, 0].tolist() == [0, 1, 0] and second is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def test_the_second_tree_shares_what_is_not_changed_and_leaves_the_first_as_it_was():
    first = nn.Sequential(Block(), Block())
    x, before = torch.randn(1, 2), first.state_dict()
    expected = first(x)
    second = second_tree(first, lambda path, module: nn.Identity() if path == "1.act" else None)
    assert second[0] is first[0] and second[1] is not first[1]
    assert second[1].up is first[1].up and isinstance(first[1].act, nn.ReLU) and isinstance(second[1].act, nn.Identity)
    assert torch.equal(first(x), expected) and first.state_dict().keys() == before.keys()
    torch.testing.assert_close(second(x), first[1].down(first[1].up(first[0](x))))
