"""A web server on the loopback interface that breaks off where a test wants it to."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Web:
    """Serves files from memory. A context manager."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.documents: dict[str, Any] = {}
        """Paths answered with JSON."""
        self.break_after: Callable[[int], int | None] = lambda number: None
        """Bytes of a body after which the n-th answer breaks off; None: not at all."""
        self.etag: str | None = '"one"'
        self.ranges = True
        """Whether it knows about parts of files."""
        self.statuses: list[int] = []
        """To answer with, before files are."""
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of every request for a file."""
        self.secrets: list[str | None] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        if path in self.documents:
            body = json.dumps(self.documents[path]).encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        asked = handler.headers.get("Range")
        self.asked.append((path, asked))
        self.secrets.append(handler.headers.get("Authorization"))
        status = self.statuses.pop(0) if self.statuses else 200
        if path not in self.files or status != 200:
            handler.send_response(404 if status == 200 else status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        whole = self.files[path]
        start = self._start(handler, asked)
        if start > len(whole) or (asked and start == len(whole)):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = whole[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        if self.etag is not None:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        most = self.break_after(len(self.asked))
        handler.wfile.write(body if most is None else body[:most])
        handler.close_connection = most is not None

    def _start(self, handler: http.server.BaseHTTPRequestHandler, asked: str | None) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        if match is None or not self.ranges:
            return 0
        same = handler.headers.get("If-Range") in (None, self.etag)
        return int(match[1]) if same else 0

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
