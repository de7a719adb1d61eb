"""Training by several processes, started as users do; as a script, one of these processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from training_setup import AtStep, losses, make_data, make_model, make_settings

from genieblue.evaluation.samples import EvaluationDataset
from genieblue.training.stages import train

ROOT = Path(__file__).parents[2]
DEEPSPEED = ROOT / ".venvs/deepspeed/bin/python"
ACCELERATE = ["accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    "accelerate": [*ACCELERATE, "--use_fsdp", "--fsdp_version=2"],
    "ZeRO-1": [*ACCELERATE, "--use_deepspeed", "--zero_stage=1"],
    "ZeRO-2": [*ACCELERATE, "--use_deepspeed", "--zero_stage=2"],
}


def launch(number: int, *command: str, launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
    """Runs a command by so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    how = ["--num_processes", str(number), "--main_process_port", port]
    if launcher == "torchrun":
        how = ["--nproc-per-node", str(number), "--master-port", port]
    python = str(DEEPSPEED) if launcher.startswith("ZeRO") else sys.executable
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = [python, "-m", *LAUNCHERS[launcher], *how, *command]
    return subprocess.run(started, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Trains as a request says; returns losses, sums of weights, and how the model was found afterwards."""
    model, processor = make_model(request["base"], lora_dropout=0.0)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        text = model(ids).logits
    callbacks = []
    if (step := request.get("stop_at")) is not None:
        callbacks.append(AtStep(step, lambda _: sys.exit("stopped")))
    if (step := request.get("kill_at")) is not None and os.environ["RANK"] == "1":
        callbacks.append(AtStep(step, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
    classes = [type(module) for module in model.modules()]
    data = make_data()[2:10]  # two of eight without an image: a process may have none
    validation = EvaluationDataset(make_data()[:2]) if request.get("validates") else None
    options = {"batch_size": 1, **request["options"]}
    result = train(
        model, processor, data, request["output"], make_settings(**options),
        resume=request.get("resume", False), callbacks=callbacks, validation=validation,
    )  # fmt: skip
    with torch.no_grad():
        text_is_equal = torch.equal(model(ids).logits, text)
    is_plain = [type(module) for module in model.modules()] == classes and all(
        type(parameter) is torch.nn.Parameter for parameter in model.parameters()
    )
    return {
        "losses": list(losses(result).values()),
        "validation": [entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry],
        "weights": {name: float(value.double().sum()) for name, value in model.state_dict().items()},
        "text_is_equal": text_is_equal,
        "is_plain": is_plain,
    }


def run_processes(number: int, launcher: str = "torchrun", **request: Any) -> Any:
    """`run` by so many processes: what the first one returns, or the failed launcher."""
    return run_in_turn(number, request, launcher=launcher)[0]


def run_in_turn(number: int, *requests: dict[str, Any], launcher: str = "torchrun") -> list[Any]:
    """`run_processes` for several requests, one after the other in the same processes: they take long to start."""
    done = launch(number, __file__, json.dumps(requests, default=str), launcher=launcher)
    if done.returncode:
        return [done] * len(requests)
    return [json.loads(Path(request["output"]).with_suffix(".json").read_text()) for request in requests]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for request in json.loads(sys.argv[1]):
        found = run(request)
        if os.environ["RANK"] == "0":
            Path(request["output"]).with_suffix(".json").write_text(json.dumps(found))
