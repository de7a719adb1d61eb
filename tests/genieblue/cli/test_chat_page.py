"""`genieblue chat --web`: what the page is made of, and what is told before a model is loaded."""

import socket
import sys
from types import SimpleNamespace

import pytest
from command_line import error_of, run
from openai_stub import openai_stub
from tiny_quantized import quantized_pair

from genieblue.serving.conversation import Chat
from genieblue.serving.server_conversation import ServerConversation

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture
def page(monkeypatch):
    """The page's module without Gradio; keeps what the command gives it."""
    given = SimpleNamespace()

    def build_page(name, conversation, max_new_tokens):
        vars(given).update(name=name, conversation=conversation, max_new_tokens=max_new_tokens)
        return SimpleNamespace(block_thread=lambda: None)

    def open_page(page, host, port):
        vars(given).update(host=host, port=port)

    monkeypatch.setitem(
        sys.modules, "genieblue.serving.web.page", SimpleNamespace(build_page=build_page, open_page=open_page)
    )
    return given


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_page_of_a_folder_is_on_loopback_and_its_address_is_told(page, port, good):
    result = run("chat", "--web", good / "genieblue", "--port", port, "--max-new-tokens", 7)
    assert f"The page is at http://127.0.0.1:{port}; Ctrl-C ends it." in result.stderr
    assert (page.host, page.max_new_tokens) == ("127.0.0.1", 7) and isinstance(page.conversation, Chat)
    assert page.conversation.ask("What is it?", max_new_tokens=2)["view"] == "text"


def test_the_page_of_a_model_on_the_hub(page, port, good, hub):
    hub.commit_folder("you/base", good / "base")
    hub.commit_folder("you/reader", good / "genieblue")
    run("chat", "--web", "you/reader", "--base", "you/base", "--port", port)
    assert page.name == "you/reader" and page.conversation.ask("What is it?", max_new_tokens=2)["text"]


def test_the_page_of_a_quantized_model(page, port):
    run("chat", "--web", quantized_pair() / "genieblue", "--port", port)
    assert page.conversation.ask("What is it?", max_new_tokens=2)["view"] == "text"


def test_the_page_of_a_server(page, port):
    with openai_stub() as server:
        run("chat", "--web", server.address, "--port", port)
        assert isinstance(page.conversation, ServerConversation)
        assert page.conversation.ask("Which tree?")["text"] == "An oak."


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "genieblue.serving.web.page", raising=False)
    message = error_of("chat", "--web", "reader", "--port", port)
    assert message == "Error: This needs the package gradio, which is not installed: pip install 'genieblue[web]'.\n"


def test_a_port_that_is_taken_is_named_before_anything_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = error_of("chat", "--web", "no-such-folder", "--port", port)
    assert f"127.0.0.1, port {port}: Address already in use. Give another --port" in message


def test_a_host_that_is_none_is_named(port):
    assert "no.such.host.invalid is no address of this computer" in error_of(
        "chat", "--web", "reader", "--host", "no.such.host.invalid", "--port", port
    )


@pytest.mark.parametrize(
    "source, message",
    [
        ("no-such-folder", "no-such-folder is not a local folder"),
        ("base", "base"),
        ("http://127.0.0.1:1", "No server answers at http://127.0.0.1:1"),
    ],
    ids=["nothing", "no GenieBlue", "no server"],
)
def test_a_source_that_is_none_is_named(page, port, work, source, message):
    assert message in error_of("chat", "--web", source, "--port", port)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--web", "reader", "--prompt", "Hi"], "--prompt: It does not apply to the page"),
        (["--web", "reader", "--temperature", "0.5"], "--temperature: It does not apply to the page"),
        (["reader", "--port", "8000"], "--port: It does not apply to a conversation in the terminal"),
        (["--web", "http://127.0.0.1:1", "--base", "b"], "--base: It does not apply to a server"),
        (["--web", "reader", "--served-model", "b"], "--served-model: It does not apply to a model that is loaded"),
        (["--web"], "Give either a model or a bundle"),
    ],
    ids=["prompt", "sampling", "port", "base of a server", "model of no server", "nothing"],
)
def test_options_that_have_no_effect_are_refused(arguments, message):
    assert message in " ".join(error_of("chat", *arguments, code=2).split())


def test_the_address_of_a_server_is_for_the_page_alone():
    assert "http://127.0.0.1:8000" in error_of("chat", "http://127.0.0.1:8000", "-p", "Hi")
