"""A page on this machine that shows pictures one by one and takes yes or no by key."""

from __future__ import annotations

import io
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from expunge.feedback.labels import LABELS, Labels

HOST = "127.0.0.1"
LONGEST = 1000  # bytes of a request's body


class Page(ThreadingHTTPServer):
    """Serves the page until it is told that all is said.

    Only this machine reaches it, on a port that the system chooses, and of it only who knows the
    random key in the address: other programs and other pages in the same browser do not (a
    request must name this very host, so a name that is pointed here later is refused as well).
    Pictures are asked for by number, never by a path. Nothing is loaded from anywhere else.

    Args:
        labels: The pictures; the CSV is written after every press.
        question: What is asked of each.

    Attributes:
        address: Where the page is.
    """

    daemon_threads = True

    def __init__(self, labels: Labels, question: str) -> None:
        super().__init__((HOST, 0), _Handler)
        self.labels, self.question = labels, question
        self.key = secrets.token_urlsafe(16)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.address = f"http://{HOST}:{self.server_port}/{self.key}/"
        self.writing = threading.Lock()

    def label(self, picture: int, label: str) -> None:
        """Note what was said of a picture, on disk before it is answered."""
        with self.writing:
            self.labels.labels[picture] = label
            self.labels.save()

    def finish(self) -> None:
        """End `serve_forever`, from one of its own threads."""
        threading.Thread(target=self.shutdown, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Page
    server_version, sys_version = "expunge", ""
    timeout = 30

    def do_GET(self) -> None:
        """The page, its state, or a picture."""
        match self._path():
            case [""]:
                nonce = secrets.token_urlsafe(16)
                page = resources.files("expunge.feedback").joinpath("page.html").read_text("utf-8")
                self._answer(
                    page.replace("NONCE", nonce).encode(), "text/html; charset=utf-8", nonce
                )
            case ["state"]:
                state = {"question": self.server.question, "labels": self.server.labels.labels}
                self._answer(json.dumps(state).encode(), "application/json")
            case ["picture", number] if self._is_picture(number):
                self._picture(int(number))
            case _:
                self.send_error(404)

    def do_POST(self) -> None:
        """A label, or the end."""
        path = self._path()
        if path not in (["label"], ["done"]):
            self.send_error(404)
            return
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            self.send_error(403)
            return
        said = self._json()
        if path == ["done"]:
            self._answer(b"{}", "application/json")
            self.server.finish()
        elif self._is_picture(number := str(said.get("picture"))) and said.get("label") in LABELS:
            self.server.label(int(number), said["label"])
            self._answer(b"{}", "application/json")
        else:
            self.send_error(400)

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet: the terminal is for the address."""

    def _path(self) -> list[str] | None:
        """What follows the key; None for whoever does not know it, or asks for another host."""
        root, *parts = self.path.split("/")
        if root or len(parts) < 2 or self.headers.get("Host") not in self.server.hosts:
            return None
        known = secrets.compare_digest(parts[0].encode(), self.server.key.encode())
        return parts[1:] if known else None

    def _is_picture(self, number: str) -> bool:
        count = len(self.server.labels.files)
        # Nine digits are enough; Python refuses to read thousands.
        plain = number.isascii() and number.isdecimal() and len(number) <= 9
        return plain and int(number) < count

    def _json(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", 0))
            found = json.loads(self.rfile.read(length)) if 0 < length <= LONGEST else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def _picture(self, number: int) -> None:
        from expunge.errors import UserError
        from expunge.pictures import read_picture, to_pil

        try:
            picture = to_pil(read_picture(self.server.labels.files[number]))
        except UserError:
            # The page says so; the picture can be left without a label.
            self.send_error(404)
            return
        data = io.BytesIO()
        picture.save(data, format="PNG")
        self._answer(data.getvalue(), "image/png")

    def _answer(self, body: bytes, kind: str, nonce: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {own}; "
            f"style-src {own}; frame-ancestors 'none'; base-uri 'none'",
        )
        self.end_headers()
        self.wfile.write(body)
