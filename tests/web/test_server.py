"""Requests of strangers to a real server: another host, another origin, too many bytes."""

from __future__ import annotations

import http.client
import socket
from contextlib import closing

import pytest
from playwright.sync_api import Browser

from maskgit_pl.web.server import MAX_UPLOAD_BYTES
from tests.web.conftest import STRANGER, Server

UPLOAD = "/gradio_api/upload"
FORM = "multipart/form-data; boundary=x"


def form(size: int) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + bytes(size) + b"\r\n--x--\r\n"


def ask(
    server: Server, method: str = "GET", path: str = "/", *, body: bytes | None = None, **headers: str
) -> http.client.HTTPResponse:
    """Sends a request; ``{port}`` in a header is the port of the server."""
    given = {name.replace("_", "-"): value.format(port=server.port) for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": FORM, **given} if body else given)
        answer = connection.getresponse()
        answer.read()
        return answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
        ({"Host": f"{STRANGER}:{{port}}"}, 403),
        ({"Host": "localhost.rebound.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://rebound.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_only_the_page_itself_is_answered(server: Server, headers: dict[str, str], status: int) -> None:
    answer = ask(server, **headers)
    assert answer.status == status
    assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"


def test_another_site_can_neither_upload_nor_open_the_page(server: Server, browser: Browser) -> None:
    before = server.written()
    for origin in ("https://rebound.example", "null"):  # a script of a site, and of a frame without an origin
        assert ask(server, "POST", UPLOAD, body=form(100), Origin=origin).status == 403
    page = browser.new_page()
    found = page.goto(f"http://{STRANGER}:{server.port}/")  # DNS rebinding
    assert found is not None
    assert found.status == 403
    page.close()
    assert server.written() == before


def test_an_upload_has_a_bound(server: Server) -> None:
    assert ask(server, "POST", UPLOAD, body=form(1000)).status == 200
    assert ask(server, "POST", UPLOAD, body=form(MAX_UPLOAD_BYTES + 1000)).status == 413  # of gradio, for one file
    assert ask(server, "POST", "/gradio_api/queue/join", Content_Length=str(2**20 + 1)).status == 413
    assert ask(server, "POST", UPLOAD, Content_Length=str(2**30)).status == 413
    with socket.create_connection(("127.0.0.1", server.port)) as sent:
        sent.sendall(f"POST {UPLOAD} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert sent.recv(100).startswith(b"HTTP/1.1 411")
