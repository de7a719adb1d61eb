"""The code that a published card prints runs as printed, in a process that has never seen this package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_genieblue import train_a_little
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM

from hub_cards.publish import publish_folder
from modeling_genieblue import GenieBlueForConditionalGeneration

REPO, BASE = "you/reader", "maker/base-llm"
# Takes an editable install, or the checkout itself, off the path.
WITHOUT_PACKAGE = f"""import sys
sys.path[:] = [entry for entry in sys.path if entry != {str(Path(__file__).parents[2])!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable___genieblue" not in finder.__module__]
try:
    import hub_cards
except ImportError:
    pass
else:
    sys.exit("The package can be imported: this run would prove nothing.")
"""


@pytest.mark.parametrize("family", ["qwen2", "bluelm"])
def test_card_code_runs_as_printed(hub, tmp_path, family):
    sha = hub.commit_folder(BASE, save_tiny_base(family, tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(BASE, revision=sha, trust_remote_code=family == "bluelm")
    model = GenieBlueForConditionalGeneration.from_base(
        base, tiny_vision_tower(), base_model_name_or_path=BASE, base_model_revision=sha
    )
    model.save_pretrained(tmp_path / "saved")
    train_a_little(tmp_path / "saved")
    publish_folder(tmp_path / "saved", REPO)

    card = hub.files(REPO)["README.md"].decode()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT_PACKAGE + code],
            cwd=tmp_path,
            env=hub.env(),
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
