"""The page as a Space of the Hub: MODEL, a variable of the Space, names the GenieBlue."""

import os
import sys

import torch

from genieblue.serving.conversation import Chat
from genieblue.serving.web.page import build_page, open_page


def page_of(model: str):
    """The page of a GenieBlue, on the Space's GPU if it has one."""
    return build_page(model, Chat.from_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    if not os.environ.get("MODEL"):
        sys.exit("Set the variable MODEL in the Space's settings to the Hub id of a GenieBlue.")
    page = page_of(os.environ["MODEL"])
    open_page(page, host="0.0.0.0")  # of the Space's container, which is behind the Hub's own server
    page.block_thread()
