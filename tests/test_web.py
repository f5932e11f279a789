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
        ({**HOST, "content-length": str(2**24)}, 200),
        ({**HOST, "content-length": str(2**25)}, 413),
        ({**HOST, "transfer-encoding": "chunked"}, 411),
    ],
    ids=str,
)
def test_the_guard_answers_only_requests_of_the_page(headers, status):
    assert asyncio.run(ask(Guard(answer), headers)) == status


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(guard: Guard, headers: dict[str, str]) -> int:
    """Sends a request to the guard and returns the status of its answer, which no site may show in a frame."""
    sent = []

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await guard({"type": "http", "path": "/", "headers": raw}, None, send)
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
