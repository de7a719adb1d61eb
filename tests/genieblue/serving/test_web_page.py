"""The page in a real browser without a window: its answers are those of the conversation, and it shows the tiles."""

import http.client
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import AbstractContextManager

import pytest
from command_line import REPOSITORY
from openai_stub import openai_stub
from PIL import Image
from server_process import server_process

from genieblue.serving.conversation import Chat

PYTHON = REPOSITORY / ".venvs/web/bin/python"
SHOTS = REPOSITORY / "build/page"  # to be looked at
SPACE = REPOSITORY / "examples/space"
SECONDS = 120
TAGS = "    if a < b:\n        print('<b>&amp;</b> <img src=x> **x** $$y$$')"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_of_the_process_are_restored")]


def environment() -> dict[str, str]:
    assert PYTHON.exists(), f"{PYTHON} is missing: `make test-slow` makes its environment"
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])}


def page_of(folder, *source) -> AbstractContextManager[str]:
    """Address of a page; its log is written in `folder`."""
    command = [str(PYTHON), "-m", "genieblue", "chat", "--web", *map(str, source), "--max-new-tokens", "8", "--port"]
    return server_process(lambda port: [*command, str(port)], folder / "page.log", path="", env=environment())


@pytest.fixture(scope="module")
def address(good):
    """Address of the page of a tiny model."""
    with page_of(good, good / "genieblue") as address:
        yield address


@pytest.fixture(scope="module")
def server():
    with openai_stub() as server:
        yield server


@pytest.fixture(scope="module")
def address_of_server(server, tmp_path_factory):
    """Address of the page of a server."""
    with page_of(tmp_path_factory.mktemp("page"), server.address) as address:
        yield address


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{option}")
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, address):
    driver.get(address)
    return driver


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "the page does not get there"
        time.sleep(0.3)
    return found


def text_of(browser, name: str) -> str:
    found = browser.find_elements("id", name)
    return found[0].text if found else ""


def said_in(browser) -> list[str]:
    """The texts of the chat as they are, with their spaces, but for what stands under an answer."""
    found = browser.find_elements("css selector", "#chat .message-content")
    return [each.get_property("textContent") for each in found]


def send(browser, entry: str, text: str, images=()) -> None:
    from selenium.webdriver.common.keys import Keys

    box = wait_for(lambda: [each for each in browser.find_elements("css selector", f"#{entry} textarea")
                            if each.is_displayed()])[0]  # fmt: skip
    if images:
        file = browser.find_element("css selector", f"#{entry} input[type=file]")
        browser.execute_script("arguments[0].value = ''", file)  # else the driver adds to what was chosen before
        file.send_keys("\n".join(map(str, images)))
        # The page shows an upload as a picture in the entry.
        wait_for(lambda: len(browser.find_elements("css selector", f"#{entry} img")) >= len(images))
    for number, line in enumerate(text.split("\n")):
        box.send_keys((Keys.SHIFT + Keys.ENTER if number else "") + Keys.NULL + line)
    box.send_keys(Keys.ENTER)


def complaint(browser) -> str:
    return " ".join(each.text for each in browser.find_elements("css selector", ".toast-body"))


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
    assert said_in(browser) == ["Hello there", first["text"]]
    assert f"text view {first['prompt_tokens']} prompt tokens" in text_of(browser, "chat")
    shoot(browser, "text")
    second = chat.ask("Which two?", [good / "scan.png", good / "tall.png"], max_new_tokens=8)
    send(browser, "entry", "Which two?", [good / "scan.png", good / "tall.png"])
    wait_for(lambda: text_of(browser, "chat").count("tiles of ") == 2)
    assert said_in(browser)[2:] == ["Which two?", second["text"]]
    assert f"multimodal view {second['prompt_tokens']} prompt tokens" in text_of(browser, "chat")
    wait_for(lambda: all(image.get_property("naturalWidth") for image in
                         browser.find_elements("css selector", "#chat img")))  # fmt: skip
    assert len(browser.find_elements("css selector", "#chat img")) == 4  # two as they are, two as they are cut
    shoot(browser, "pictures")
    third = chat.ask("And now?", max_new_tokens=8)
    send(browser, "entry", "And now?")
    wait_for(lambda: text_of(browser, "chat").count("tokens/s") == 3)
    assert said_in(browser)[4:] == ["And now?", third["text"]]
    assert f"multimodal view {third['prompt_tokens']} prompt tokens" in text_of(browser, "chat")
    shoot(browser, "third-turn")


def test_a_text_is_shown_as_it_is(browser):
    send(browser, "entry", TAGS)
    wait_for(lambda: "tokens/s" in text_of(browser, "chat"))
    assert said_in(browser)[0] == TAGS and not browser.find_elements("css selector", "#chat img")


def test_a_new_conversation_knows_nothing_of_the_last_one(browser, good):
    for start in ("#reset", "#chat button[aria-label=Clear]"):
        send(browser, "entry", "Hello there", [good / "scan.png"])
        wait_for(lambda: "multimodal view" in text_of(browser, "chat"))
        browser.find_element("css selector", start).click()
        wait_for(lambda: not text_of(browser, "chat"))
        send(browser, "entry", "Hello")
        wait_for(lambda: "text view" in text_of(browser, "chat"))
        browser.find_element("id", "reset").click()
        wait_for(lambda: not text_of(browser, "chat"))


def test_an_empty_message_is_refused_and_the_next_one_answered(browser):
    send(browser, "entry", "   ")
    wait_for(lambda: "The prompt is empty" in complaint(browser))
    shoot(browser, "refused")
    send(browser, "entry", "Hello")
    wait_for(lambda: "tokens/s" in text_of(browser, "chat"))


def test_a_picture_that_cannot_be_read_is_named_and_stays_in_the_entry(browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name, message in {"broken.png": "cannot be read as an image", "large.png": "is too large"}.items():
        browser.refresh()
        send(browser, "entry", "What is it?", [tmp_path / name])
        wait_for(lambda message=message: message in complaint(browser))
        assert f"{name} {message}" in complaint(browser) and not text_of(browser, "chat")
        assert browser.find_elements("css selector", "#entry img")


def test_nothing_can_be_sent_to_others_by_a_button(browser, good):
    send(browser, "entry", "What is it?", [good / "scan.png"])
    wait_for(lambda: "tokens/s" in text_of(browser, "chat"))
    shown = {each.get_attribute("aria-label") for each in browser.find_elements("tag name", "button")
             if each.is_displayed()}  # fmt: skip
    assert {"Clear", "Fullscreen"} <= shown and not shown & {"Share", "Download"}


def test_side_by_side_the_base_and_the_text_view_answer_alike(browser, good):
    wait_for(lambda: browser.find_elements("css selector", "button[role=tab]"))
    for tab in browser.find_elements("css selector", "button[role=tab]"):
        if tab.text == "Side by side":
            tab.click()
    send(browser, "compare", "What is it?", [good / "scan.png"])
    wait_for(lambda: "the same answer" in text_of(browser, "verdict"))
    assert "base alone 1" in text_of(browser, "base-alone") and "text view 1" in text_of(browser, "text-view")
    assert "multimodal view" in text_of(browser, "multimodal-view")
    assert "tiles of" in text_of(browser, "multimodal-view")
    shoot(browser, "side-by-side")


def test_the_answer_of_a_server_claims_no_view(driver, address_of_server, good):
    driver.get(address_of_server)
    send(driver, "entry", "What is it?", [good / "scan.png"])
    wait_for(lambda: "tokens/s" in text_of(driver, "chat"))
    assert said_in(driver) == ["What is it?", "An oak."]
    assert "server, asked with pictures 9 prompt tokens · 3 generated" in text_of(driver, "chat")
    shoot(driver, "server")


def test_a_bundle_for_a_phone_answers_on_the_page_as_its_graphs_do(driver, good, tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")
    from tiny_qnn import SETTINGS, requests, save_pair

    from conversion.qnn.bundle.runner import QnnRunner
    from conversion.qnn.export import export_bundle
    from genieblue.serving.qnn_conversation import QnnChat

    bundle = export_bundle(save_pair(tmp_path), tmp_path / "bundle", calibration=requests(), **SETTINGS)
    chat = QnnChat(QnnRunner(bundle))
    answers = [chat.ask("a", max_new_tokens=8), chat.ask("b", [good / "scan.png"], max_new_tokens=8)]
    with page_of(tmp_path, "--qnn", bundle) as address:
        driver.get(address)
        send(driver, "entry", "a")
        wait_for(lambda: "tokens/s" in text_of(driver, "chat"))
        send(driver, "entry", "b", [good / "scan.png"])
        wait_for(lambda: text_of(driver, "chat").count("tokens/s") == 2)
        assert said_in(driver) == ["a", answers[0]["text"], "b", answers[1]["text"]]
        shown = text_of(driver, "chat")
        assert f"text view {answers[0]['prompt_tokens']} prompt" in shown and "multimodal view" in shown
        shoot(driver, "bundle")


def test_a_turn_in_which_the_server_dies_leaves_the_conversation_as_it_was(driver, server, address_of_server):
    driver.get(address_of_server)
    send(driver, "entry", "Which tree?")
    wait_for(lambda: "tokens/s" in text_of(driver, "chat"))
    server.ending = b""
    send(driver, "entry", "And this?")
    wait_for(lambda: "The server hung up in the middle of its answer" in complaint(driver))
    server.ending = b"data: [DONE]\n\n"
    assert said_in(driver) == ["Which tree?", "An oak."]
    assert driver.find_element("css selector", "#entry textarea").get_property("value") == "And this?"


def test_an_answer_that_is_stopped_is_marked_and_not_part_of_the_conversation(driver, server, address_of_server):
    driver.get(address_of_server)
    server.pause = 1
    send(driver, "entry", "Which tree?")
    wait_for(lambda: "An" in text_of(driver, "chat"))
    driver.find_element("id", "stop").click()
    wait_for(lambda: "Stopped: this turn is not part of the conversation." in text_of(driver, "chat"))
    server.pause = 0
    send(driver, "entry", "And this?")
    wait_for(lambda: "tokens/s" in text_of(driver, "chat"))
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["And this?"]


def test_files_of_others_are_not_served(address, good):
    files = [good / "scan.png", good / "genieblue/config.json", REPOSITORY / "setup.py", "/etc/passwd"]
    for path in [*files, "/tmp/gradio/../../etc/passwd", "setup.py", "http://127.0.0.1:1/"]:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("GET", f"/gradio_api/file={path}")
        assert connection.getresponse().status == 403, path


def test_the_page_is_on_loopback_alone(address):
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # where a server of all networks would answer too
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_the_space_builds_the_page_with_the_gradio_that_it_names(good):
    code = f"import app; print(app.page_of({str(good / 'genieblue')!r}).title)"
    result = subprocess.run([PYTHON, "-c", code], cwd=SPACE, env=environment(), capture_output=True, text=True)
    assert result.stdout == "GenieBlue: genieblue\n", result.stderr
    version = re.search("sdk_version: (.*)", (SPACE / "README.md").read_text())[1]
    assert f"gradio=={version}\n" in (REPOSITORY / "tests/clients/web.txt").read_text()
