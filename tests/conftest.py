"""What every test has: no way out to the network, a fixed seed, few threads, and a Hub cache of its own."""

import gc
import inspect
import os
import random
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

# huggingface_hub and transformers read their settings when they are imported, so all of this comes before that.
if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before tests/conftest.py could point it away from the real Hub.")

from hub_server import HubServer  # noqa: E402

NETWORK_GUARD = Path(__file__).parent / "support" / "network_guard"
SESSION_HOME = Path(tempfile.mkdtemp(prefix="genieblue-tests-"))
HUB = HubServer()
# Processes of `pytest -n` that waited for each other's threads would be slower than one alone.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
NUM_THREADS = min(2 if WORKERS == 1 else 1, int(os.environ.get("OMP_NUM_THREADS", 2)))
LONG_FILES = (
    "tests/optimum_cli/test_optimum_cli.py",
    "tests/genieblue/training/test_zero.py",
    "tests/genieblue/training/test_devices.py",
    "tests/genieblue/demo/test_demo_run.py",
)

for _name in list(os.environ):
    if _name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
os.environ.update(
    HF_ENDPOINT=HUB.endpoint,
    HF_HOME=str(SESSION_HOME),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=str(NUM_THREADS),
    # Closes the network to the processes that tests start, too.
    PYTHONPATH=os.pathsep.join(filter(None, [str(NETWORK_GUARD), os.environ.get("PYTHONPATH")])),
)
runpy.run_path(str(NETWORK_GUARD / "sitecustomize.py"))

import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from huggingface_hub.utils import _cache_manager, http_backoff, http_stream_backoff  # noqa: E402


def pytest_collection_modifyitems(items: list) -> None:
    # Two processes share the files: of one that takes long and comes late, the second would see the end idle.
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in LONG_FILES)


def pytest_collection_finish() -> None:
    # What the libraries and tests left in memory when they were imported is no garbage: every collection would go
    # through all of it again, and each training asks for a few.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    HUB.stop()
    shutil.rmtree(SESSION_HOME, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def curves() -> None:
    """For tests of a run's curves: others draw none, which takes longer than all steps of a tiny model."""


@pytest.fixture(autouse=True)
def no_other_curves(request, monkeypatch) -> None:
    run_log = sys.modules.get("genieblue.training.run_log")
    if run_log is not None and "curves" not in request.fixturenames:
        monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """`base`, `vision`, a trained-looking `genieblue`, and `scan.png`."""
    from PIL import Image
    from tiny_genieblue import save_tiny_pair
    from tiny_models import tiny_vision_tower

    folder = tmp_path_factory.mktemp("good")
    save_tiny_pair(folder)
    tiny_vision_tower().save_pretrained(folder / "vision")
    Image.new("RGB", (48, 24), "red").save(folder / "scan.png")
    return folder


@pytest.fixture
def work(good, tmp_path, monkeypatch) -> Path:
    """A copy of `good` that a test may change, as the current folder."""
    folder = shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def settings_of_the_process_are_restored(monkeypatch):
    """For tests that run the command in this process, which quiets libraries for good."""
    from transformers.utils import logging as transformers_logging

    from genieblue.cli import terminal

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    monkeypatch.delenv("GENIEBLUE_DEBUG", raising=False)
    yield
    terminal._debug = False
    transformers_logging.set_verbosity(verbosity)
    if had_bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture
def impatient_client(monkeypatch) -> None:
    """Lets huggingface_hub repeat a failed request at once, instead of after up to 23 seconds of waiting."""
    for function in (http_backoff, inspect.unwrap(http_stream_backoff)):
        for name in ("base_wait_time", "max_wait_time"):
            monkeypatch.setitem(function.__kwdefaults__, name, 0.01)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch, impatient_client) -> HubServer:
    """An empty Hub that this process and those started with `hub.env()` use, with a cache of its own.

    The test is logged in as the Hub's `you`; `hub.home` is its HF_HOME.
    """
    home = tmp_path_factory.mktemp("hf-home")
    HUB.reset()
    HUB.start()
    monkeypatch.setattr(HUB, "home", home)
    monkeypatch.setenv("HF_TOKEN", HUB.token)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    for module in (constants, _cache_manager):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    yield HUB
    HUB.reset()


@pytest.fixture
def no_network(monkeypatch, impatient_client) -> None:
    """Nothing answers, the test's own Hub included: connections are refused as on a computer without network."""

    def refuse(self, address):
        raise ConnectionRefusedError(f"No network in this test: {address}")

    huggingface_hub.close_session()  # connections that are kept open would still work
    monkeypatch.setattr("socket.socket.connect", refuse)
