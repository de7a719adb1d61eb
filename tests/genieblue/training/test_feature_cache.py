"""Features of a frozen vision tower on disk: the run is the same, and the tower runs once for each tile."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_setup import AtStep, chat, losses, make_base, make_data, make_model, make_settings

from genieblue.data.chats import ChatDataset
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.training import feature_cache, stages
from genieblue.training.feature_cache import FEATURES, cached_features
from genieblue.training.plan import format_plan
from genieblue.training.stages import plan, train

FROZEN = {"learning_rates": {"vision_tower": 0.0}}  # in stage 2
CACHED = {"cache_image_features": True, "epochs": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


def run(base, output, *, dtype=torch.float32, callbacks=(), resume=False, validation=None, **options):
    """A run, and how many tiles the tower computed in it."""
    model, processor = make_model(base)
    model.vision_tower.to(dtype)
    tiles = []
    model.vision_tower.embeddings.register_forward_hook(lambda _module, given, _output: tiles.append(len(given[0])))
    result = train(model, processor, make_data(), output, make_settings(**options), callbacks=callbacks,
                   resume=resume, validation=validation)  # fmt: skip
    return result, sum(tiles), model


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"stage": 1}, 0), ({"stage": 1, "bf16": True}, 0), (FROZEN, 1e-5),
     ({**FROZEN, "pack": True, "max_length": 64}, 1e-5)],
    ids=("stage 1", "bf16 autocast", "stage 2", "packs"),
)  # fmt: skip
def test_a_run_is_the_same_and_computes_each_tile_once(base, tmp_path, options, tolerance):
    """Bit for bit where all batches have equally many tiles; rounding in the tower depends on their number."""
    plain, tiles, model = run(base, tmp_path / "plain", epochs=3, **options)
    cached, fewer, other = run(base, tmp_path / "cached", **CACHED, **options)
    assert losses(cached) == pytest.approx(losses(plain), rel=tolerance, abs=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=tolerance)
    assert fewer * 3 == tiles
    assert not (tmp_path / "cached-run" / FEATURES).exists()
    assert "forward" not in vars(other.vision_tower)


def test_a_resumed_run_reads_what_the_first_one_computed(base, tmp_path):
    options = {"stage": 1, "save_steps": 4, **CACHED}
    plain, tiles, _ = run(base, tmp_path / "plain", **{**options, "cache_image_features": False})
    with pytest.raises(SystemExit):
        run(base, tmp_path / "out", callbacks=[AtStep(5, lambda _: sys.exit())], **options)
    assert any((tmp_path / "out-run" / FEATURES).iterdir())
    resumed, computed, _ = run(base, tmp_path / "out", resume=True, **options)
    assert computed == 0
    assert {step: loss for step, loss in losses(plain).items() if step > 4}.items() <= losses(resumed).items()


def test_validation_reads_features_too(base, tmp_path):
    options = {"stage": 1, "eval_steps": 2, "eval_answers": 2, "eval_max_new_tokens": 2}
    held_out = [chat("<image>\nWhich colour?", "Red.", Image.new("RGB", (24, 24), "red"))]
    plain, _, _ = run(base, tmp_path / "plain", epochs=3, validation=EvaluationDataset(held_out), **options)
    cached, tiles, _ = run(base, tmp_path / "out", validation=EvaluationDataset(held_out), **options, **CACHED)
    # The tower sees other batches, and on some processors the last bit of a product depends on their size.
    assert cached.best == pytest.approx(plain.best, rel=1e-5)
    assert tiles == 8  # the held-out image is one of the training images


def features_of(model, pixels, folder):
    """What the tower gives in a run that then stops, and how many tiles that leaves on disk."""
    with pytest.raises(SystemExit), cached_features(model.vision_tower, folder, 0):
        outputs = model.vision_tower(pixels, return_dict=True)
        sys.exit()
    return outputs.last_hidden_state, len(list(folder.rglob("*.safetensors")))


def test_another_tower_dtype_or_image_never_gets_stale_features(base, tmp_path):
    model, _ = make_model(base)
    pixels = torch.randn(2, 3, 24, 24)
    folder = tmp_path / "run"
    with torch.no_grad():
        assert features_of(model, pixels, folder)[1] == 2
        assert features_of(model, pixels, folder)[1] == 2
        assert features_of(model, pixels + 1e-6, folder)[1] == 4
        next(model.vision_tower.parameters()).view(-1)[0] += 1
        found, count = features_of(model, pixels, folder)
        assert count == 6 and torch.equal(found, model.vision_tower(pixels).last_hidden_state)
        with torch.autocast("cpu", torch.bfloat16):
            assert features_of(model, pixels, folder)[1] == 8
        model.vision_tower.bfloat16()
        found, count = features_of(model, pixels.bfloat16(), folder)
        assert count == 10 and found.dtype == torch.bfloat16


def test_a_file_that_was_cut_off_is_computed_again(base, tmp_path):
    model, _ = make_model(base)
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected, _ = features_of(model, pixels, tmp_path / "run")
        path = next((tmp_path / "run").rglob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        assert torch.equal(features_of(model, pixels, tmp_path / "run")[0], expected)


def test_a_full_disk_ends_the_cache_and_not_the_run(base, tmp_path, monkeypatch, caplog):
    plain, tiles, _ = run(base, tmp_path / "plain", stage=1, epochs=3)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(stages, "cached_features", lambda tower, run, _: cached_features(tower, run, 2 * 10**9))
    cached, computed, _ = run(base, tmp_path / "out", stage=1, **CACHED)
    assert losses(cached) == losses(plain) and computed == tiles
    assert "No further image features are kept" in caplog.text


def test_the_plan_says_what_the_features_take(base, tmp_path):
    model, processor = make_model(base)
    sizes = []

    def measure(_model):
        files = (tmp_path / "out-run" / FEATURES).rglob("*.safetensors")
        sizes.extend(tensor.nbytes for path in files for tensor in load_file(path).values())

    settings = make_settings(stage=1, **CACHED)
    planned = plan(model, processor, ChatDataset(make_data()), settings)
    train(model, processor, make_data(), tmp_path / "out", settings, callbacks=[AtStep(11, measure)])
    assert planned.image_features == sum(sizes)
    assert planned.kept == plan(model, processor, ChatDataset(make_data()), make_settings(stage=1)).kept + sum(sizes)
    assert any("read in 3 epochs" in line for line in format_plan(planned))


@pytest.mark.parametrize(
    ("options", "dropout", "message"),
    [({"stage": 2}, 0.0, "the vision tower is trained"), ({"stage": 1}, 0.1, r"drops features.*attention_dropout")],
    ids=("trained", "dropout"),
)
def test_a_tower_whose_features_change_is_refused(base, tmp_path, options, dropout, message):
    model, processor = make_model(base)
    model.vision_tower.config.attention_dropout = dropout
    with pytest.raises(ValueError, match=message):
        train(model, processor, make_data(), tmp_path / "out", make_settings(**options, **CACHED))
    assert not list(tmp_path.iterdir())


def test_a_part_with_a_rate_of_zero_stays_frozen(base, tmp_path):
    before, _ = make_model(base)
    _, _, after = run(base, tmp_path / "out", steps=2, **FROZEN)
    changed = {name.partition(".")[0] for name, value in after.state_dict().items()
               if not torch.equal(value, before.state_dict()[name])}  # fmt: skip
    assert "vision_tower" not in changed and "multi_modal_projector" in changed
    rates = dict.fromkeys(("vision_tower", "multi_modal_projector", "replicated_blocks", "lora"), 0.0)
    with pytest.raises(ValueError, match="All learning rates are 0"):
        run(base, tmp_path / "none", steps=2, learning_rates=rates)
