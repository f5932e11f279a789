"""The command of the page and the guard in front of it, without gradio; ``tests/web`` tries the page itself."""

import asyncio
import socket

import pytest

from maskgit_pl.cli import main
from maskgit_pl.web import server
from maskgit_pl.web.server import Guard, open_socket

HOST = {"host": "localhost:7860"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (HOST, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "LocalHost"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.0.7:7860"}, 403),
        ({"host": "localhost.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({**HOST, "origin": "http://LOCALHOST:7860"}, 200),
        ({**HOST, "origin": "http://localhost"}, 403),
        ({**HOST, "origin": "null"}, 403),
        ({**HOST, "content-length": str(2**20)}, 200),
        ({**HOST, "content-length": str(2**24)}, 413),  # an upload: tests/web
        ({**HOST, "transfer-encoding": "chunked"}, 411),
    ],
    ids=str,
)
def test_the_guard_answers_only_requests_of_the_page(headers, status, tmp_path):
    assert asyncio.run(ask(Guard(answer, tmp_path), headers)) == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"data": [[{"image": {"path": "{files}/a.png", "meta": {}}}], null, 7], "fn_index": 8}', 200),
        ('{"path": null, "url": "file:///etc/passwd"}', 200),
        ('{"data": [[{"image": {"path": "/etc/passwd", "meta": {}}}]]}', 403),
        ('{"path": "/etc/passwd", "path": "{files}/a.png"}', 403),
        ('{"\\u0070ath": "/etc/passwd"}', 403),
        ('{"path": "{files}/../b.png"}', 403),
        ('{"path": "{files}/link.png"}', 403),
        ('{"path": "{files}/gone.png"}', 403),
        ('{"path": "{files}"}', 403),
        ('{"path": "{files}/a.png\\u0000"}', 403),
        ('{"path": "http://203.0.113.1/a.png"}', 403),
        ("{path}", 403),
        ("[" * 100_000, 403),
        ("", 403),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_guard_takes_only_events_whose_files_are_those_of_the_page(body, status, tmp_path):
    files = tmp_path / "link" / "files"
    (tmp_path / "real" / "files").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")  # as the temporary folder of macOS
    for path in (files / "a.png", files.parent / "b.png"):
        path.touch()
    (files / "link.png").symlink_to(files.parent / "b.png")
    body = body.replace("{files}", str(files))
    received = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            received.append(message["body"])
        await answer(scope, receive, send)

    assert asyncio.run(ask(Guard(app, files), HOST, "/gradio_api/queue/join", body.encode())) == status
    assert b"".join(received).decode() == (body if status == 200 else "")


def test_the_guard_lets_gradio_load_nothing_from_another_site(tmp_path):
    path = "/gradio_api/file=https://203.0.113.1/a.png"
    assert asyncio.run(ask(Guard(answer, tmp_path), HOST, path)) == 403


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(guard: Guard, headers: dict[str, str], path: str = "/", body: bytes | None = None) -> int:
    """Sends a request to the guard and returns the status of its answer, which no site may show in a frame."""
    sent = []
    parts = iter([(body or b"")[:10], (body or b"")[10:]])

    async def receive():
        part = next(parts, None)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": len(part) == 10}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    method = "GET" if body is None else "POST"
    await guard({"type": "http", "method": method, "path": path, "headers": raw}, receive, send)
    assert (b"content-security-policy", b"frame-ancestors 'none'") in sent[0]["headers"]
    return sent[0]["status"]


def test_a_used_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port must be a free port of this machine, got {port}"):
            open_socket(port)
    with pytest.raises(ValueError, match="port must be an integer in"):
        open_socket(0)


def test_the_command_tells_how_to_install_gradio(monkeypatch, capsys):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert main(["web"]) == 2
    assert capsys.readouterr().err == "maskgit web: web requires the package gradio: pip install 'maskgit_pl[web]'\n"
