"""Asks a GenieBlue that runs in llama.cpp: about images in its multimodal view, and about text its base.

    llama-server -m base.gguf --lora-scaled reader-gguf/lora.gguf:0 --cache-ram 0 --no-cache-prompt \
        --mmproj reader-gguf/mmproj.gguf --image-min-tokens 64 --image-max-tokens 64
    python examples/llamacpp_client.py reader-2 "What is the total?" receipt.png
"""

import argparse
import base64
import io
import json
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image

from modeling_genieblue import GenieBlueProcessor

TEXT_VIEW, MULTIMODAL_VIEW = ([{"id": 0, "scale": scale}] for scale in (0.0, 1.0))


# llama.cpp drops a cache that another adapter has filled only if both requests name theirs, as these do.
CACHED = {"cache_prompt": True}


def post(server: str, path: str, content: dict[str, Any] | None = None) -> Any:
    """The server's answer to a request; without `content`, to a GET."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def cut_into_tiles(processor: GenieBlueProcessor, image: Any) -> list[str]:
    """The tiles and the thumbnail of an image as the model sees them, each as a PNG in base64.

    But for the padding: its grey is between two of the 256 values that llama.cpp reads.
    """
    pixels = processor.image_processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
    tiles = []
    for tile in numpy.asarray(pixels):
        file = io.BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0).round().astype("uint8")).save(file, "PNG")  # a JPEG has other pixels
        tiles.append(base64.b64encode(file.getvalue()).decode())
    return tiles


def image_prompt(server: str, processor: GenieBlueProcessor, question: str, images: Sequence[Any]) -> dict[str, Any]:
    """The chat as the model was trained on it, with a marker for each tile, which llama.cpp puts its texts around."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text: Any = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    marker = post(server, "/props")["media_marker"]
    if marker in text:
        raise ValueError(f"The question holds {marker!r}, which marks an image in llama.cpp: reword it.")
    tiles = [cut_into_tiles(processor, image) for image in images]
    first, *others = text.pieces
    bos = processor.tokenizer.bos_token
    if bos and first.startswith(bos) and post(server, "/tokenize", {"content": "", "add_special": True})["tokens"]:
        first = first.removeprefix(bos)  # the server adds its own
    prompt = first + "".join(marker * len(tile) + piece for tile, piece in zip(tiles, others, strict=True))
    return {"prompt_string": prompt, "multimodal_data": [each for tile in tiles for each in tile]}


def ask(server: str, processor: GenieBlueProcessor, question: str, images: Sequence[Any] = (), **options: Any) -> str:
    """The answer to a question; `options` are llama.cpp's, such as `n_predict` and `temperature`."""
    if not images:
        messages = [{"role": "user", "content": question}]
        answer = post(server, "/v1/chat/completions", {"messages": messages, "lora": TEXT_VIEW, **CACHED, **options})
        return answer["choices"][0]["message"]["content"]
    prompt = image_prompt(server, processor, question, images)
    return post(server, "/completion", {"prompt": prompt, "lora": MULTIMODAL_VIEW, **CACHED, **options})["content"]


def main() -> None:
    """Prints one answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of the GenieBlue, whose processor is used")
    parser.add_argument("question")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    arguments = parser.parse_args()
    processor = GenieBlueProcessor.from_pretrained(arguments.model)
    print(ask(arguments.server, processor, arguments.question, arguments.images, n_predict=256, temperature=0))


if __name__ == "__main__":
    main()
