"""Downloads over a real local connection, good and bad."""

import hashlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

from inflora.data import download as module
from inflora.data.download import download

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path == "/file":
            self.wfile.write(CONTENT)

    def do_HEAD(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path != "/file":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_file_arrives_whole(server: str, tmp_path: Path) -> None:
    download(f"{server}/file", tmp_path / "new" / "file", MD5)
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_wrong_checksum_leaves_nothing(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="the file that arrived is damaged"):
        download(f"{server}/file", tmp_path / "file", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_missing_page(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="Not Found"):
        download(f"{server}/other", tmp_path / "new" / "file", MD5)
    assert list(tmp_path.iterdir()) == []


def test_refused_connection(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionError, match="refused"):
        download(f"http://127.0.0.1:{port}/file", tmp_path / "file", MD5)


def test_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionError, match=r"nothing arrived|timed out"):
            download(f"http://127.0.0.1:{silent.getsockname()[1]}/file", tmp_path / "file", MD5)


def test_hanging_name_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket timeout covers a name look-up: only abandoning the thread does."""
    release = threading.Event()

    def hang(*args: object, **options: object) -> list:
        release.wait(10)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(module, "STALL_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="nothing arrived for 0 seconds"):
        download("http://example.invalid/file", tmp_path / "file", MD5)
    assert time.monotonic() - start < 5
    release.set()


def test_default_patience() -> None:
    assert (module.ANSWER_S, module.STALL_S) == (5, 15)


def test_a_server_that_answers_is_reachable_whatever_it_says(server: str) -> None:
    module.check_reachable(f"{server}/file")
    module.check_reachable(f"{server}/other")
    module.check_reachable(f"{server}/elsewhere")


def test_a_server_that_refuses_is_not(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionError, match="refused"):
        module.check_reachable(f"http://127.0.0.1:{port}/file")


def test_a_certificate_that_only_another_client_may_know_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise URLError(ssl.SSLCertVerificationError("certificate verify failed"))

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    module.check_reachable("https://example.invalid/file")


def test_where_a_proxy_stands_that_urllib_does_not_use_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://example.invalid:1080")
    monkeypatch.setattr(module, "_arriving", None)  # would fail
    module.check_reachable("https://example.invalid/file")
