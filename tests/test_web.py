"""The command of the page and the guard in front of it, without gradio; ``tests/web`` tries the page itself."""

import asyncio
import socket

import pytest

from maskgit_pl.cli import main
from maskgit_pl.web import server
from maskgit_pl.web.server import Guard, open_socket

HOST = {"host": "localhost:7860"}
LENGTH = {**HOST, "content-length": "1000"}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", HOST, 200),
        ("/", {"host": "127.0.0.1:7860"}, 200),
        ("/", {"host": "LocalHost"}, 200),
        ("/", {"host": "[::1]:7860"}, 200),
        ("/", {"host": "192.168.0.7:7860"}, 403),
        ("/", {"host": "localhost.example"}, 403),
        ("/", {"host": ""}, 403),
        ("/", {"host": "[::1"}, 403),
        ("/", {**HOST, "origin": "http://LOCALHOST:7860"}, 200),
        ("/", {**HOST, "origin": "http://localhost"}, 403),
        ("/", {**HOST, "origin": "null"}, 403),
        ("/upload", LENGTH, 200),
        ("/upload", {**HOST, "content-length": str(2**24)}, 200),
        ("/upload", {**HOST, "content-length": str(2**25)}, 413),
        ("/join", {**HOST, "content-length": str(2**24)}, 413),
        ("/join", {**HOST, "transfer-encoding": "chunked"}, 411),
    ],
    ids=str,
)
def test_the_guard_answers_only_requests_of_the_page(tmp_path, path, headers, status):
    guard = Guard(answer, folder=tmp_path)
    assert asyncio.run(ask(guard, path, headers)) == status


def test_uploads_stop_while_the_folder_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_MAX_FOLDER_BYTES", 2500)
    guard = Guard(answer, folder=tmp_path)
    assert [asyncio.run(ask(guard, "/upload", LENGTH)) for _ in range(3)] == [200] * 3  # one after the other
    (tmp_path / "kept").write_bytes(bytes(1600))
    assert asyncio.run(ask(guard, "/upload", LENGTH)) == 507
    assert asyncio.run(ask(guard, "/join", LENGTH)) == 200

    async def two_at_once() -> list[int]:
        waiting = asyncio.Event()

        async def wait(scope, receive, send):
            await waiting.wait()
            await answer(scope, receive, send)

        (tmp_path / "kept").write_bytes(bytes(1000))
        slow = Guard(wait, folder=tmp_path)
        first = asyncio.create_task(ask(slow, "/upload", LENGTH))
        await asyncio.sleep(0)
        second = await ask(slow, "/upload", LENGTH)
        waiting.set()
        return [await first, second]

    assert asyncio.run(two_at_once()) == [200, 507]


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(guard: Guard, path: str, headers: dict[str, str]) -> int:
    """Sends a request to the guard and returns the status of its answer, which no site may show in a frame."""
    sent = []

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await guard({"type": "http", "path": path, "headers": raw}, None, send)
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
