"""Start moto's S3 server on this machine, and disturb what it answers."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SLOW_S, HANG_S = 0.2, 3.0
BROKEN = {"500": "500 Internal Server Error", "503": "503 Slow Down"}


class Quiet(WSGIRequestHandler):
    """A handler that logs no requests."""

    protocol_version = "HTTP/1.1"

    def log(self, *args) -> None:
        pass


class ObjectStore:
    """An S3 server. `fault` gets each request, as "PUT /bucket/name", and returns its fault.

    A fault is a status of `BROKEN`, or: "slow", "hang" (answers after the client has given up),
    "half" (the connection breaks within the body), "lost" (the request is done, but not answered),
    or "".
    """

    def __init__(self):
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.fault: Callable[[str], str] = lambda request: ""
        self.faults: list[str] = []
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        return keys | {"AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1"}

    @contextmanager
    def disturbed(self, fault: Callable[[str], str]) -> Iterator[list[str]]:
        """Answer with these faults; yield the list of those that were made."""
        self.fault, self.faults = fault, []
        try:
            yield self.faults
        finally:
            self.fault = lambda request: ""

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Any:
        fault = self.fault(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if fault:
            self.faults.append(fault)
        if fault in BROKEN:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = BROKEN[fault].partition(" ")[2].replace(" ", "")
            start_response(BROKEN[fault], [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>test</Message></Error>".encode()]
        if fault in ("slow", "hang"):
            time.sleep(SLOW_S if fault == "slow" else HANG_S)
        if fault == "half" and environ["REQUEST_METHOD"] == "PUT":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            return _break(environ)
        answer = self._app(environ, start_response)
        if fault == "half":
            body = b"".join(answer)
            return _first_half(environ, body)
        return _break(environ) if fault == "lost" else answer

    def stop(self) -> None:
        self._server.shutdown()


def _first_half(environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _break(environ)


def _break(environ: dict[str, Any]) -> Any:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("the test breaks the connection")


class Files:
    """The objects of one bucket, as a test looks at them."""

    def __init__(self, store: ObjectStore, name: str):
        self.name = name
        client = {"endpoint_url": store.url}
        keys = {"key": "test", "secret": "test", "client_kwargs": client}
        self._store = s3fs.S3FileSystem(**keys, use_listings_cache=False, skip_instance_cache=True)
        self._store.mkdir(name)

    def names(self, under: str = "") -> set[str]:
        root = f"{self.name}/{under}".rstrip("/")
        return {path.removeprefix(f"{root}/") for path in self._store.find(root)}

    def read(self, name: str) -> bytes:
        return self._store.cat_file(f"{self.name}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._store.pipe_file(f"{self.name}/{name}", data)

    def delete(self, name: str) -> None:
        self._store.rm_file(f"{self.name}/{name}")
