"""Training by several processes: `DistributedDataParallel`, with and without gradient checkpointing; ZeRO."""

import os
import socket

import pytest
import torch
from tiny_genieblue import IMAGE, prompt, row, tiles, tiny_genieblue
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

SETTINGS = {
    "plain": {},
    "checkpointing": {"use_reentrant": False},
    "reentrant checkpointing": {"use_reentrant": True},
    "static graph": {"use_reentrant": True, "static_graph": True},
}


def train(rank: int, port: int, settings: dict, folder: str) -> None:
    """Three steps in which each process sees an image at other times than the other one."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    settings = dict(settings)
    static_graph = settings.pop("static_graph", False)
    model = tiny_genieblue().train()
    if settings:
        model.gradient_checkpointing_enable(settings)
    wrapped = DistributedDataParallel(model, static_graph=static_graph)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for step in range(3):
        sees = (step + rank) % 2 == 0
        ids = row(5, IMAGE, 9, 40, 41) if sees else prompt()
        loss = wrapped(ids, pixel_values=tiles() if sees else None, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
    # Freeing what is left may wait forever: Gloo's thread frees its last work, for which it needs Python's lock, and
    # the main thread holds that while it waits for Gloo's.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_processes_with_and_without_images_train_one_model(setting, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train, args=(port, SETTINGS[setting], str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    untrained = tiny_genieblue().state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    moved = {name.split(".")[0] for name, value in one.items() if not torch.equal(value, untrained[name])}
    assert moved == {"vision_tower", "multi_modal_projector", "multimodal_language_model"}


def test_gradients_come_in_one_order_with_and_without_images_under_zero():
    """Processes of DeepSpeed's ZeRO add up buckets that each fills as gradients come, whatever they belong to."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = tiny_genieblue().train()
    order = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.get_full_hp_param = None  # as ZeRO marks what it trains
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for ids, pixel_values in ((row(5, IMAGE, 9, 40, 41), tiles()), (prompt(), None)):
        model(ids, pixel_values=pixel_values, labels=ids, view="multimodal").loss.backward()
    distributed.destroy_process_group()
    half = len(order) // 2
    assert order[:half] == order[half:]


def test_data_parallel_is_refused_by_name():
    """What it calls first for each device; without several GPUs it never does."""
    with pytest.raises(ValueError, match="torchrun"):
        tiny_genieblue()._replicate_for_data_parallel()
