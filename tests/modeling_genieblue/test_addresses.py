"""No address is printed with its user, password, query or fragment, wherever it comes from."""

import functools
import logging
import threading
import traceback
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from modeling_genieblue.addresses_genieblue import redacted, refuse_address, shown
from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.loading_genieblue import LoadRequest, Provenance

SECRETS = ("us3r", "passw0rd", "t0ken", "fr4gment", "r3direct", "c0ntent")


def errors_of(call) -> list[BaseException]:
    """What a call raises, and all that a program finds behind it."""
    with pytest.raises((OSError, ValueError)) as caught:
        call()
    found, waiting = [], [caught.value]
    while waiting:
        error = waiting.pop()
        found.append(error)
        waiting += [other for other in (error.__cause__, error.__context__) if other not in (None, *found)]
    return found


def assert_no_secret(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text], text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://us3r:passw0rd@host/x.png?key=t0ken#fr4gment", "http://host/x.png"),
        ("HTTPS://us3r@host:80/x", "HTTPS://host:80/x"),
        ("http:/us3r:passw0rd@host/x", "http:/host/x"),  # as pathlib writes it
        ("http://host?t0ken", "http://host"),
        ("http://us3r:0/passw0rd@host", "http://…"),
        ("http://us3r:pass w0rd@host/x", "http://host/x"),
        ("https://host/pkg@1.0/x.png", "https://host/pkg@1.0/x.png"),
        ("http://[::1]:80/x?t0ken", "http://[::1]:80/x"),
        ("s3://bucket/key?sign=t0ken", "s3://bucket/key"),
        ("see 'http://us3r:passw0rd@h/x?t0ken' or http://h/y?t0ken", "see 'http://h/x' or http://h/y"),
        ("data:image/png;base64,c0ntent", "data:…"),
        ("data:,c0ntent", "data:…"),
        ("Authorization: Bearer t0ken, hf_t0kent0kent0kent0ken", "Authorization: Bearer … …"),
        ("HF_ENDPOINT, hf_transfer, HF_HUB_ENABLE_HF_TRANSFER", "HF_ENDPOINT, hf_transfer, HF_HUB_ENABLE_HF_TRANSFER"),
        ("us3r:passw0rd@host/x.png?key=t0ken", "host/x.png"),
        ("//us3r:passw0rd@host:80/x.png", "//host:80/x.png"),
        ("no file www.host/x.png?sig=t0ken&a=t0ken, sorry", "no file www.host/x.png, sorry"),
        ("https://host/x.png&key=t0ken", "https://host/x.png"),
        ("at https://host/x?t0ken; expected", "at https://host/x; expected"),
        ("at 12:30 @home, C:\\a@b", "at 12:30 @home, C:\\a@b"),
        ("C:/a/b.png", "C:/a/b.png"),
        ("/tmp/what?#is this@home.png", "/tmp/what?#is this@home.png"),
        ("metadata:a/b, data: none", "metadata:a/b, data: none"),
        ("Data: pages 60 %, charts/2024; no URL", "Data: pages 60 %, charts/2024; no URL"),
    ],
)
def test_of_an_address_scheme_host_and_path_are_left(text, expected):
    assert redacted(text) == expected


def test_a_shown_text_is_short():
    assert len(shown("x" * 5000)) < 300


def test_an_address_is_no_name_of_a_model(tmp_path):
    for name in ("https://us3r:passw0rd@host/org/name?t0ken", "HTTP://us3r@host"):
        (error,) = errors_of(lambda name=name: refuse_address(name))
        assert "expected a folder or a Hub id" in str(error)
        assert_no_secret(str(error))
    for name in (None, "org/name", str(tmp_path), "name"):
        refuse_address(name)


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/moved"):
            self.send_response(302)
            target = "http://us3r:r3direct@127.0.0.1:{}/{}?t0ken" if "away" in self.path else "http://h:r3direct/{1}"
            self.send_header("Location", target.format(self.server.server_port, "missing.png"))
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture
def served(tmp_path):
    """A folder, and where its files are served; `/moved…` leads elsewhere."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"us3r:passw0rd@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["missing.png", "page.html", "cut.png", "bomb.eps", "moved-away", "moved-wrongly"])
def test_no_error_about_a_served_image_holds_a_secret(served, name):
    folder, host = served
    (folder / "page.html").write_text("<html>")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    Image.new("RGB", (4, 4)).save(folder / "bomb.eps")
    address = f"http://{host}/{name}?key=t0ken#fr4gment"
    errors = errors_of(lambda: read_image(address))
    assert "http://127.0.0.1" in str(errors[0]) and f"/{name}" in str(errors[0])
    for error in errors:
        assert_no_secret(f"{error!r} {error} {getattr(error, 'filename', '')}")
    assert_no_secret("".join(traceback.format_exception(errors[0])))


@pytest.mark.parametrize(
    "source",
    [
        "http://us3r:passw0rd@127.0.0.1:1/x.png?t0ken",
        "http://us3r:passw0rd",  # a port that is none
        "http://us3r:pass/w0rd/passw0rd@host/x.png",
        "HTTP://us3r:passw0rd@127.0.0.1:1/x.png#fr4gment",
        " http://us3r:passw0rd@127.0.0.1:1/x.png",
        "ftp://us3r:passw0rd@host/x.png",
        Path("http://us3r:passw0rd@host/x.png?t0ken"),
        "data:text/plain,c0ntent",
        "data:image/png;base64,c0ntent%",
        "data:image/png;base64,c0ntent=",
        "data:text/plain," + "c0ntent" * 1000,
    ],
)
def test_no_error_about_an_address_that_cannot_be_read_holds_a_secret(source):
    errors = errors_of(lambda: read_image(source))
    for error in errors:
        assert_no_secret(f"{error!r} {error} {getattr(error, 'filename', '')}")


def test_a_proxys_password_is_not_shown(monkeypatch):
    import huggingface_hub

    huggingface_hub.close_session()
    monkeypatch.setenv("HTTP_PROXY", "socks9://us3r:passw0rd@127.0.0.1:1")
    errors = errors_of(lambda: read_image("http://127.0.0.1:1/x.png"))
    huggingface_hub.close_session()
    for error in errors:
        assert_no_secret(f"{error!r} {error}")


def test_what_remembers_a_load_does_not_show_its_token():
    request = LoadRequest("a/b", {"token": "t0ken"}, {}, {"token": "t0ken"})
    assert_no_secret(repr(Provenance(source=request, access=request.access())))


def test_logs_and_warnings_about_a_served_image_hold_no_secret(served, caplog):
    folder, host = served
    frames = [Image.new("L", (4, 4), grey) for grey in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.DEBUG):  # as `genieblue --debug` logs
        read_image(f"http://{host}/moving.gif?key=t0ken")
        with pytest.raises(OSError):
            read_image(f"http://{host}/moved-away?key=t0ken")
    logged = [record.getMessage() for record in caplog.records]
    assert any("has 2 frames" in message for message in logged)
    assert any("HTTP Request: GET http://127.0.0.1" in message for message in logged)
    assert_no_secret(" ".join(logged))
