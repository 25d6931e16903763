"""No network, a web server of the test's own, and GPT-2's encoding where its files are at hand."""

import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.text import Download

HERE = "127.0.0.1"
DATA = Path(__file__).parents[2] / "data"

settings.register_profile("shared machine", deadline=None, suppress_health_check=[*HealthCheck])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that asks for another machine fails, even where the code takes a refusal well."""
    asked, look_up = [], socket.getaddrinfo

    def only_here(host, *args, **kwargs):
        if host != HERE:
            asked.append(host)
            raise socket.gaierror(f"{host}: the tests are offline")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setenv("NO_PROXY", HERE)
    yield
    assert not asked


class Web:
    """What a server on this machine holds, and what it was asked for."""

    def __init__(self, port: int):
        self.url, self.files, self.asked = f"http://{HERE}:{port}", {}, []

    def put(self, name: str, content: bytes, says: bytes | None = None) -> Download:
        """A download of `content`; the server gives what it `says`, if that is another thing."""
        self.files[f"/{name}"] = content if says is None else says
        return Download(f"{self.url}/{name}", hashlib.sha256(content).hexdigest())


@pytest.fixture
def web():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            content = web.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer((HERE, 0), Handler) as server:
        web = Web(server.server_port)
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield web
        server.shutdown()


@pytest.fixture
def no_gpt2(monkeypatch, web):
    """GPT-2's files are not to be had."""
    lost = tuple(web.put(Path(file.url).name, b"", b"?") for file in tokenizers.GPT2_FILES)
    monkeypatch.setattr(tokenizers, "GPT2_FILES", lost)


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory):
    """A data folder with a copy of GPT-2's files: no test can harm those at hand."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "gpt2").mkdir()
    for download in tokenizers.GPT2_FILES:
        file = DATA / "gpt2" / Path(download.url).name
        if not file.exists():
            pytest.skip(f"needs GPT-2's files in data/gpt2: put {download.url} there")
        content = file.read_bytes()
        assert hashlib.sha256(content).hexdigest() == download.sha256, f"{file} is damaged"
        (folder / "gpt2" / file.name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_data):
    return tokenizers.gpt2(gpt2_data)
