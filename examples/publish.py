"""Publish a GenieBlue and load it back by name, on a local Hub server.

    python examples/publish.py --model runs/trained --base runs/smollm2

The same calls publish to huggingface.co: remove the local Hub and log in with `hf auth login`.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from hub_server import HubServer  # noqa: E402

hub = HubServer()
hub.start()
# huggingface_hub reads these when it is imported, so set them first.
os.environ |= hub.env(HF_HOME=tempfile.mkdtemp(), HF_HUB_DISABLE_XET="1")

from huggingface_hub import HfApi  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from hub_cards.publish import publish_folder  # noqa: E402


def main(model: Path, base: Path) -> None:
    api = HfApi()
    api.create_repo("you/smollm2")
    api.upload_folder(repo_id="you/smollm2", folder_path=base)
    commit = publish_folder(model, "you/reader", base="you/smollm2")
    print(f"Published: {commit.commit_url}")

    # Remote code should run only in the version that was read: name its commit.
    pinned = {"revision": commit.oid, "code_revision": commit.oid, "trust_remote_code": True}
    reader = AutoModelForImageTextToText.from_pretrained("you/reader", **pinned)
    processor = AutoProcessor.from_pretrained("you/reader", **pinned)
    picture = Image.new("RGB", (128, 64), "white")
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "Which word?"}]
    for content in ("What is the capital of France?", question):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = reader.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
        print(processor.batch_decode(answer, skip_special_tokens=True)[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/trained"), help="folder of a trained GenieBlue")
    parser.add_argument("--base", type=Path, default=Path("runs/smollm2"), help="folder of its base")
    arguments = parser.parse_args()
    main(arguments.model, arguments.base)
