"""Requests of strangers to a real server: another host, another origin, too many bytes, files that are not the page's.

The events are those of the page's own config: a new event, and a new field of one, is tested without a new test.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser

from maskgit_pl.web.server import MAX_UPLOAD_BYTES
from tests.web.conftest import STRANGER, Server

UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
FORM = "multipart/form-data; boundary=x"
SECRET = b"the secret of the user"
CONTENTS = (SECRET, b"root:x:0:", b"TMPDIR=", b'"dependencies":')  # of what a case names
TAKES_FILES = ("gallery", "image", "imageeditor", "uploadbutton")

OUTSIDE = {
    "a file of the system": "/etc/passwd",
    "the environment": "/proc/self/environ",
    "a private picture": "{place}/home/private.png",
    "a hidden file": "{place}/here/.env",
    "the working directory": "notes.txt",
    "the working directory of the process": "/proc/self/cwd/notes.txt",
    "dots": "{files}/../../../home/private.png",
    "a link": "{files}/link.png",
    "the folder itself": "{files}",
    "a file that is gone": "{files}/gone.png",
    "a null character": "/etc/passwd\0.png",
    "an address of a file": "file:///etc/passwd",
    "an address of the page": "{url}config",
    "an address of the network": "http://169.254.169.254/latest/meta-data",
    "a file without an end": "/dev/zero",
    "a pipe": "{place}/home/pipe",
}  # fmt: skip
ADDRESSES = (
    "file=/etc/passwd", "file=/proc/self/environ", "file={place}/home/private.png", "file=notes.txt",
    "file={files}/../../../home/private.png", "file=file:///etc/passwd", "file={url}config", "file//etc/passwd",
    "proxy={url}config", "proxy=file:///etc/passwd", "custom_component/0/client/component/../../../../etc/passwd",
    "../static/../../../../../../../../../etc/passwd", "../assets/../../../../../../../../../etc/passwd",
)  # fmt: skip


def form(content: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n"


def ask(
    server: Server, method: str = "GET", path: str = "/", *, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    """Sends a request, and returns the status and the content of the answer, a stream up to the end of an event.

    ``{port}`` in a header is the port of the server.
    """
    given = {name.replace("_", "-"): value.format(port=server.port) for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": FORM, **given} if body else given)
        answer, lines = connection.getresponse(), []
        for line in answer:
            lines.append(line)
            if b'"msg":"process_completed"' in line:
                break
        return answer.status, b"".join(lines)


def submit(server: Server, event: int, data: list[Any]) -> tuple[int, bytes]:
    """Sends an event as the page does; returns status and text of its answer, with the files that the answer names."""
    session = secrets.token_hex(8)
    body = json.dumps({"data": data, "fn_index": event, "session_hash": session}).encode()
    status, said = ask(server, "POST", JOIN, body=body, Content_Type="application/json")
    if status != 200:
        return status, said
    _, said = ask(server, path=f"/gradio_api/queue/data?session_hash={session}")
    urls = re.findall(rb'"url":"([^"]+)"', said)
    return status, b"\n".join([said, *(ask(server, path=urlsplit(url.decode()).path)[1] for url in urls)])


def fields(server: Server) -> Iterator[tuple[int, int, list[Any], dict[str, Any]]]:
    """Yields each field of each event of the page: event, place of the field, values of all fields, the component."""
    config = json.loads(ask(server, path="/config")[1])
    components = {component["id"]: component for component in config["components"]}
    for event in config["dependencies"]:
        if event["backend_fn"]:
            inputs = [components[number] for number in event["inputs"]]
            for place, component in enumerate(inputs):
                yield event["id"], place, [other["props"].get("value") for other in inputs], component


def file_value(component: dict[str, Any], path: str, **more: str) -> Any:
    """Returns the value of a component with a file, as the page sends it."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    if component["type"] == "imageeditor":
        return {"background": file, "layers": [file], "composite": file}
    return [{"image": file, "caption": None}] if component["type"] == "gallery" else file


@pytest.fixture
def names(server: Server) -> dict[str, str]:
    """Writes files of the user that no page may show; returns what stands in braces in a case."""
    home, here = server.place / "home", server.place / "here"
    picture = io.BytesIO()
    Image.new("L", (28, 28), 200).save(picture, format="PNG")
    (home / "private.png").write_bytes(picture.getvalue() + SECRET)
    for path in (here / "notes.txt", here / ".env"):
        path.write_bytes(SECRET)
    (folder,) = (server.place / "tmp").glob("maskgit-web-*/gradio")
    if not (home / "pipe").exists():
        os.mkfifo(home / "pipe")
        (folder / "link.png").symlink_to(home / "private.png")
    return {"place": str(server.place), "files": str(folder), "url": server.url}


def test_another_site_can_neither_upload_nor_open_the_page(server: Server, browser: Browser) -> None:
    before = server.written()
    assert ask(server, Host="localhost:{port}", Origin="http://localhost:{port}")[0] == 200
    assert ask(server, "POST", UPLOAD, body=form(bytes(100)), Origin="https://rebound.example")[0] == 403
    page = browser.new_page()
    answer = page.goto(f"http://{STRANGER}:{server.port}/")  # DNS rebinding
    assert answer is not None
    assert answer.status == 403
    page.close()
    assert server.written() == before


def test_uploads_and_requests_have_a_largest_size(server: Server) -> None:
    assert ask(server, "POST", UPLOAD, body=form(bytes(1000)))[0] == 200
    assert ask(server, "POST", UPLOAD, body=form(bytes(MAX_UPLOAD_BYTES + 1000)))[0] == 413  # of gradio, for one file
    assert ask(server, "POST", UPLOAD, Content_Length=str(2**30))[0] == 413


@pytest.mark.parametrize("case", OUTSIDE)
def test_no_event_names_a_file_that_is_not_of_the_page(server: Server, names: dict[str, str], case: str) -> None:
    path, faults = OUTSIDE[case].format(**names), []
    for event, place, data, component in fields(server):
        data[place] = file_value(component, path)
        status, said = submit(server, event, data)
        printed = server.printed()
        if status != 403 or printed or any(content in said for content in CONTENTS):
            faults.append((event, component["type"], status, said[:200], printed[-200:]))
    assert faults == []
    assert ask(server)[0] == 200  # the page still answers


@pytest.mark.parametrize("url", ["file:///etc/passwd", "{place}/home/private.png", "{url}config"])
def test_the_files_of_the_page_are_taken_wherever_a_field_takes_files(
    server: Server, names: dict[str, str], url: str
) -> None:
    """Tries the requests of the test above with an upload: their form is right. Its ``url`` changes nothing."""
    picture = io.BytesIO()
    Image.new("L", (28, 28), 100).save(picture, format="PNG")
    (path,) = json.loads(ask(server, "POST", UPLOAD, body=form(picture.getvalue()))[1])
    taken = []
    for event, place, data, component in fields(server):
        if component["type"] in TAKES_FILES:
            data[place] = file_value(component, path, url=url.format(**names))
            _, said = submit(server, event, data)
            assert b'"success":true' in said or b"an image is missing" in said
            assert not any(content in said for content in CONTENTS)
            taken.append(component["type"])
    assert {"image", "imageeditor", "uploadbutton"} <= set(taken)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_of_the_page_is_that_of_another_file(server: Server, names: dict[str, str], address: str) -> None:
    for path in (address, quote(address, safe="={}")):
        status, said = ask(server, path=f"/gradio_api/{path}".format(**names))
        assert status in (403, 404)
        assert not any(content in said for content in CONTENTS)


@pytest.mark.parametrize("path", ["process_recording", "component_server"])
def test_only_an_upload_is_a_form(server: Server, path: str) -> None:
    assert ask(server, "POST", f"/gradio_api/{path}", body=form(bytes(100)))[0] == 403


@pytest.mark.parametrize(
    ("label", "value", "sentence"),
    [
        ("Class", None, "class must be one of the list, got None; choose one"),
        ("Class", [], "class must be one of the list, got []; choose one"),
        ("Seed", None, "seed must be an integer in [0, 2**32), got None"),
        ("Seed", -5, "seed must be an integer in [0, 2**32), got -5"),
        ("Seed", 99999999999, "seed must be an integer in [0, 2**32), got 99999999999"),
        ("Token selector", [], '"success":true'),  # as the model
    ],
)
def test_a_field_without_a_lawful_value_is_one_sentence(server: Server, label: str, value: Any, sentence: str) -> None:
    event, place, data, _ = next(field for field in fields(server) if field[3]["props"].get("label") == label)
    data[place] = value
    assert sentence.encode() in submit(server, event, data)[1]
