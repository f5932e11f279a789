"""Requests of strangers to a real server: another host, another origin, too many bytes."""

from __future__ import annotations

import http.client
from contextlib import closing

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


def test_another_site_can_neither_upload_nor_open_the_page(server: Server, browser: Browser) -> None:
    before = server.written()
    assert ask(server, Host="localhost:{port}", Origin="http://localhost:{port}").status == 200
    assert ask(server, "POST", UPLOAD, body=form(100), Origin="https://rebound.example").status == 403
    page = browser.new_page()
    answer = page.goto(f"http://{STRANGER}:{server.port}/")  # DNS rebinding
    assert answer is not None
    assert answer.status == 403
    page.close()
    assert server.written() == before


def test_uploads_and_requests_have_a_largest_size(server: Server) -> None:
    assert ask(server, "POST", UPLOAD, body=form(1000)).status == 200
    assert ask(server, "POST", UPLOAD, body=form(MAX_UPLOAD_BYTES + 1000)).status == 413  # of gradio, for one file
    assert ask(server, "POST", UPLOAD, Content_Length=str(2**30)).status == 413
