"""The page in a real browser without a window: its answers are those of the conversation, and it shows the tiles."""

import os
import shutil
import time
from contextlib import AbstractContextManager

import pytest
from command_line import REPOSITORY
from PIL import Image
from server_process import server_process

from genieblue.serving.conversation import Chat

PYTHON = REPOSITORY / ".venvs/web/bin/python"
SHOTS = REPOSITORY / "build/page"  # to be looked at
SECONDS = 120
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_of_the_process_are_restored")]


@pytest.fixture(scope="module")
def address(good):
    """Address of the page of a tiny model."""
    with page_of(good / "genieblue", good) as address:
        yield address


def page_of(source, folder) -> AbstractContextManager[str]:
    """Address of a page; its log is written in `folder`."""
    assert PYTHON.exists(), f"{PYTHON} is missing: `make test-slow` makes its environment"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])}
    command = [str(PYTHON), "-m", "genieblue", "chat", "--web", str(source), "--max-new-tokens", "8", "--port"]
    return server_process(lambda port: [*command, str(port)], folder / "page.log", path="", env=environment)


@pytest.fixture
def browser(address):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{option}")
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.get(address)
    yield driver
    driver.quit()


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "the page does not get there"
        time.sleep(0.3)
    return found


def text_of(browser, name: str) -> str:
    found = browser.find_elements("id", name)
    return found[0].text if found else ""


def send(browser, entry: str, text: str, images=()) -> None:
    from selenium.webdriver.common.keys import Keys

    box = wait_for(lambda: [each for each in browser.find_elements("css selector", f"#{entry} textarea")
                            if each.is_displayed()])[0]  # fmt: skip
    if images:
        file = browser.find_element("css selector", f"#{entry} input[type=file]")
        file.send_keys("\n".join(map(str, images)))
        # The page shows an upload as a picture in the entry.
        wait_for(lambda: len(browser.find_elements("css selector", f"#{entry} img")) >= len(images))
    box.send_keys(text + Keys.ENTER)


def shoot(browser, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    time.sleep(1)  # pictures are still being drawn
    browser.save_screenshot(str(SHOTS / f"{name}.png"))


def test_a_chat_with_text_then_two_pictures_then_text(browser, good):
    chat = Chat.from_pretrained(good / "genieblue")
    Image.new("RGB", (24, 70), "blue").save(good / "tall.png")
    first = chat.ask("Hello there", max_new_tokens=8)
    send(browser, "entry", "Hello there")
    wait_for(lambda: "tokens/s" in text_of(browser, "chat"))
    assert first["text"].strip() in text_of(browser, "chat") and "[text view" in text_of(browser, "chat")
    shoot(browser, "text")
    second = chat.ask("Which two?", [good / "scan.png", good / "tall.png"], max_new_tokens=8)
    send(browser, "entry", "Which two?", [good / "scan.png", good / "tall.png"])
    wait_for(lambda: text_of(browser, "chat").count("tiles]") == 2)
    shown = text_of(browser, "chat")
    assert second["text"].strip() in shown
    assert f"[multimodal view · {second['prompt_tokens']} prompt tokens" in shown
    shoot(browser, "pictures")
    third = chat.ask("And now?", max_new_tokens=8)
    send(browser, "entry", "And now?")
    wait_for(lambda: text_of(browser, "chat").count("tokens/s") == 3)
    assert f"[multimodal view · {third['prompt_tokens']} prompt tokens" in text_of(browser, "chat")
    shoot(browser, "third-turn")


def test_an_empty_message_is_refused_and_the_next_one_answered(browser):
    send(browser, "entry", "   ")
    wait_for(lambda: "The prompt is empty" in browser.find_element("tag name", "body").text)
    shoot(browser, "refused")
    send(browser, "entry", "Hello")
    wait_for(lambda: "tokens/s" in text_of(browser, "chat"))


def test_side_by_side_the_base_and_the_text_view_answer_alike(browser, good):
    wait_for(lambda: browser.find_elements("css selector", "button[role=tab]"))
    for tab in browser.find_elements("css selector", "button[role=tab]"):
        if tab.text == "Side by side":
            tab.click()
    send(browser, "compare", "What is it?", [good / "scan.png"])
    wait_for(lambda: "the same answer" in text_of(browser, "verdict"))
    assert "[base alone" in text_of(browser, "base-alone") and "[text view" in text_of(browser, "text-view")
    assert "[multimodal view" in text_of(browser, "multimodal-view")
    shoot(browser, "side-by-side")
