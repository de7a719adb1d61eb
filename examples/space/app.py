"""The page as a Space of the Hub: MODEL, a variable of the Space, names the GenieBlue."""

import os

from genieblue.serving.conversation import Chat
from genieblue.serving.web.page import build_page, open_page

if __name__ == "__main__":
    chat = Chat.from_pretrained(os.environ["MODEL"])
    page = build_page(os.environ["MODEL"], lambda: Chat(chat.model, chat.processor), max_new_tokens=256)
    open_page(page, host="0.0.0.0")  # of the Space's container, which is behind the Hub's own server
