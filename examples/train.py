"""Train a GenieBlue to read short words drawn by Pillow: both stages, a few minutes on two cores.

    python examples/train.py --model runs/reader --out runs/trained

After these few steps it reads some of the words. `genieblue train` takes more data and uses the paper's settings.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from genieblue.data.chats import ChatDataset
from genieblue.serving.conversation import Chat
from genieblue.training.stages import TrainingSettings, train

WORDS = "cat dog sun sea car red ice map cup hat fox bee owl key box jam".split()
QUESTION = "Which word?"


def draw_words(folder: Path, count: int) -> Path:
    """`count` pictures of words, and a JSONL file of chats about them."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(0)
    lines = []
    for index in range(count):
        word = chooser.choice(WORDS)
        picture = Image.new("RGB", (96, 48), "white")
        font = ImageFont.load_default(size=chooser.randint(24, 34))
        ImageDraw.Draw(picture).text((chooser.randint(2, 20), chooser.randint(0, 8)), word, "black", font)
        picture.save(folder / f"{index:04}.png")
        question = [{"type": "image", "image": f"{index:04}.png"}, {"type": "text", "text": QUESTION}]
        lines.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": word}]})
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return data


def main(model: Path, out: Path, steps: int) -> None:
    data = draw_words(out.with_name(f"{out.name}-words"), 400)
    chat = Chat.from_pretrained(str(model))
    for stage, folder, count, rate in ((1, out.with_name(f"{out.name}-1"), steps // 3, 2e-3), (2, out, steps, 1e-3)):
        settings = TrainingSettings(stage=stage, steps=count, batch_size=4, learning_rate=rate, save_steps=0)
        train(chat.model, chat.processor, ChatDataset(data), folder, settings)
        chat = Chat.from_pretrained(str(folder))
    print("Answer:", chat.ask(QUESTION, [str(data.with_name("0000.png"))])["text"])
    chat.reset()
    print("Text, from the base alone:", chat.ask("What is the capital of France?", max_new_tokens=20)["text"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/reader"), help="folder of the GenieBlue to train")
    parser.add_argument("--out", type=Path, default=Path("runs/trained"), help="folder for the trained one")
    parser.add_argument("--steps", type=int, default=60, help="steps of stage 2")
    arguments = parser.parse_args()
    main(arguments.model, arguments.out, arguments.steps)
