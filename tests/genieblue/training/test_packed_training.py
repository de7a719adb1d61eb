"""Training on packs: the loss and gradients of single samples, for each family or refused; plan, log and resume."""

import pytest
import torch
from PIL import Image
from tiny_genieblue import tiny_genieblue
from tiny_models import FAMILIES, FAMILIES_WITH_BOS, REMOTE_CODE_FAMILIES, tiny_base, tiny_tokenizer
from training_setup import AtStep, chat, losses, make_base, make_data, make_model, make_settings

from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator, EncodedChats, joined
from genieblue.training.packed_attention import check_packing
from genieblue.training.precision import prepared_for_training
from genieblue.training.stages import plan, train
from genieblue.training.structure import GenieBlueStructure
from modeling_genieblue import GenieBlueProcessor

PACKABLE = [family for family in FAMILIES if family not in REMOTE_CODE_FAMILIES]
PACKED = {"pack": True, "max_length": 128, "batch_size": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


def processor_of(model, family: str) -> GenieBlueProcessor:
    return GenieBlueProcessor.from_base(
        tiny_tokenizer(add_bos=family in FAMILIES_WITH_BOS),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        tile_size=24,
        max_tiles=4,
    )


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Of stage 2, as the trainer computes them."""
    structure = GenieBlueStructure(model)
    with prepared_for_training(structure, structure.groups, False):
        loss = model(**batch, view="multimodal", use_cache=False, keep_logits=False).loss
        loss.backward()
        gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_loss_and_gradients_are_those_of_single_rows(family):
    model = tiny_genieblue(family)
    processor = processor_of(model, family)
    collator = ChatCollator(processor)
    samples = [*make_data()[:3], chat("What is 3?", "A number, 3, as are 1, 2, 4 and 5."), *make_data()[-2:]]
    rows = [row for sample in samples for row in EncodedChats(ChatDataset([sample]), collator)[0]]
    assert max(len(row["input_ids"]) for row in rows) > 2 * 6  # sliding windows are shorter
    single = collator([rows])
    packed = collator([[joined(rows[:4])], [joined(rows[4:])]])
    assert packed["pixel_values"].equal(single["pixel_values"])
    expected, gradients = loss_and_gradients(model, single)
    loss, packed_gradients = loss_and_gradients(model, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


def test_pack_in_a_loop_of_ones_own_keeps_its_samples_apart():
    """Trainer turns `use_cache` off; with a cache, transformers takes a pack for one text."""
    model = tiny_genieblue()
    collator = ChatCollator(processor_of(model, "llama"))
    rows = [row for sample in make_data()[:3] for row in collator.rows(sample)]
    with torch.no_grad():
        losses = [model(**collator(batch), view="multimodal").loss.item() for batch in ([rows], [[joined(rows)]])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_family_that_keeps_samples_apart_is_accepted(family, dtype):
    model = tiny_genieblue(base=tiny_base(family, dtype=dtype))
    check_packing(model, ChatCollator(processor_of(model, family)))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", REMOTE_CODE_FAMILIES)
def test_family_that_mixes_samples_is_refused_by_name(family, dtype):
    model = tiny_genieblue(base=tiny_base(family, dtype=dtype))
    with pytest.raises(ValueError, match=r"BlueLMForCausalLM \(.*change each other's logits.*--no-pack"):
        check_packing(model, ChatCollator(processor_of(model, family)))


def test_base_that_takes_no_positions_is_refused():
    model = tiny_genieblue("llama")

    def refuse(_module, _args, kwargs):
        if "position_ids" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")

    model.multimodal_language_model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM .*TypeError.*position_ids.*--no-pack"):
        check_packing(model, ChatCollator(processor_of(model, "llama")))


def test_refused_base_is_refused_before_anything_is_written(tmp_path):
    model = tiny_genieblue("bluelm")
    with pytest.raises(ValueError, match="cannot be trained on packed samples"):
        train(model, processor_of(model, "bluelm"), make_data(), tmp_path / "out", make_settings(**PACKED))
    assert list(tmp_path.iterdir()) == []


def seen_arguments(model, name: str) -> list[torch.Tensor]:
    """What each pass of training gives the multimodal view as `name`."""
    seen = []

    def note(_view, _args, kwargs):
        if model.training and name in kwargs:  # not in a look at the embedding
            seen.append(kwargs[name])

    model.multimodal_language_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("options", [{"epochs": 3}, {"epochs": 2, "gradient_accumulation": 2}], ids=str)
def test_plan_of_a_packed_run_is_what_the_run_takes(base, tmp_path, options):
    model, processor = make_model(base)
    settings = make_settings(**PACKED, **options)
    planned = plan(model, processor, ChatDataset(make_data()), settings)
    seen = seen_arguments(model, "position_ids")
    result = train(model, processor, make_data(), tmp_path / "out", settings)
    assert result.steps == planned.steps
    assert planned.packs < planned.samples == 11
    assert sum(int((positions == 0).sum()) for positions in seen) == 11 * settings.epochs


def test_packs_joined_in_one_row_for_flash_attention_give_the_same_losses(base, tmp_path, monkeypatch):
    settings = make_settings(**PACKED | {"batch_size": 2}, epochs=1)
    apart = train(*make_model(base, lora_dropout=0.0), make_data(), tmp_path / "apart", settings)
    monkeypatch.setattr("genieblue.training.structure.uses_flash_attention", lambda model: True)
    model, processor = make_model(base, lora_dropout=0.0)
    seen = seen_arguments(model, "position_ids")
    joined = train(model, processor, make_data(), tmp_path / "joined", settings)
    assert losses(joined) == pytest.approx(losses(apart), rel=1e-4) and len(losses(apart)) == 2
    assert {len(positions) for positions in seen} == {1}


def test_log_counts_samples_and_tokens_without_padding(base, tmp_path):
    model, processor = make_model(base)
    settings = make_settings(**PACKED | {"batch_size": 99, "steps": 1})
    result = train(model, processor, make_data(), tmp_path / "out", settings)
    (speed,) = (entry for entry in result.log_history if "samples_per_second" in entry)
    rows = [row for sample in make_data() for row in ChatCollator(processor).rows(sample)]
    expected = sum(len(row["input_ids"]) for row in rows) / len(rows)
    assert speed["tokens_per_second"] / speed["samples_per_second"] == pytest.approx(expected)
    # Of Trainer, which would count packs.
    assert not [name for entry in result.log_history for name in entry if name.startswith("train_samples")]


def test_a_step_is_planned_with_no_more_packs_than_there_are(base):
    planned = plan(*make_model(base), ChatDataset(make_data()), make_settings(**PACKED | {"batch_size": 99}))
    assert planned.steps == 1
    assert planned.tokens_per_step == pytest.approx(planned.samples * planned.tokens_per_sample)


class Interrupted(Exception):
    pass


def interrupt(_model) -> None:
    raise Interrupted


# Four and six steps an epoch: within the second epoch.
@pytest.mark.parametrize(
    ("options", "stop_at"), [(PACKED, 6), ({"group_by_length": True}, 7)], ids=["packed", "by length"]
)
def test_resumed_run_equals_an_uninterrupted_one_bit_by_bit(options, stop_at, base, tmp_path):
    settings = make_settings(**{"epochs": 2, "save_steps": 1, "keep_checkpoints": 9, **options})

    def run(output, *callbacks, resume=False):
        model, processor = make_model(base)
        result = train(model, processor, make_data(), output, settings, resume=resume, callbacks=callbacks)
        return losses(result), dict(model.named_parameters())

    whole, weights = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", AtStep(stop_at, interrupt))
    resumed, resumed_weights = run(tmp_path / "cut", resume=True)
    assert resumed == whole and len(whole) > stop_at
    assert all(torch.equal(value, weights[name]) for name, value in resumed_weights.items())


def test_packed_run_is_not_resumed_without_packing(base, tmp_path):
    with pytest.raises(Interrupted):
        train(*make_model(base), make_data(), tmp_path / "out", make_settings(**PACKED, save_steps=1),
              callbacks=[AtStep(2, interrupt)])  # fmt: skip
    with pytest.raises(ValueError, match="pack was True, now False"):
        train(*make_model(base), make_data(), tmp_path / "out", make_settings(save_steps=1), resume=True)


def test_batches_by_length_have_less_padding_and_every_sample_once(base, tmp_path):
    data = [chat("What?", "A number" + ", 12" * (number % 2 * 9) + ".") for number in range(32)]

    def rows(name, **options):
        model, processor = make_model(base)
        seen = seen_arguments(model, "attention_mask")
        train(model, processor, data, tmp_path / name, make_settings(epochs=1, batch_size=2, **options))
        return seen

    grouped, mixed = rows("grouped", group_by_length=True), rows("mixed")
    assert sum(int((mask == 0).sum()) for mask in grouped) < sum(int((mask == 0).sum()) for mask in mixed)
    assert sum(map(int, (mask.sum() for mask in grouped))) == sum(map(int, (mask.sum() for mask in mixed)))


@pytest.mark.parametrize("other", [{"pack": True}, {"shuffle": False}], ids=str)
def test_grouping_with_what_contradicts_it_is_refused(other):
    with pytest.raises(ValueError, match="group_by_length"):
        make_settings(group_by_length=True, **other)


def test_pack_with_images_of_several_tiles_is_trained(base, tmp_path):
    model, processor = make_model(base)
    pictures = [Image.new("RGB", (48, 48), "red"), Image.new("RGB", (24, 24), "blue")]
    data = [chat("<image>\n<image>\nWhich?", "Red, blue.", *pictures), chat("What is 1?", "One.")]
    tiles = []
    model.vision_tower.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    result = train(model, processor, data, tmp_path / "out", make_settings(**PACKED | {"max_length": 256}))
    assert result.steps == 1 and tiles == [6]
