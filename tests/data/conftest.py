"""Define fixtures: no network, a local web server, and GPT-2's tokenizer if its files exist."""

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
    """Fail every test that contacts another machine, even if the code handles the error."""
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
    """The files of a local web server, and the paths that were requested from the server."""

    def __init__(self, port: int):
        self.url, self.files, self.asked = f"http://{HERE}:{port}", {}, []

    def put(self, name: str, content: bytes, says: bytes | None = None) -> Download:
        """Return a download of `content`; if `says` is given, the server answers with `says`."""
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
    """Make GPT-2's files unavailable."""
    lost = tuple(web.put(Path(file.url).name, b"", b"?") for file in tokenizers.GPT2_FILES)
    monkeypatch.setattr(tokenizers, "GPT2_FILES", lost)


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory):
    """Return a data folder with a copy of GPT-2's files, so that no test changes the originals."""
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
