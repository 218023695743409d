"""The page as a browser meets it: real requests over a real socket."""

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from PIL import Image

from expunge.feedback.labels import NO, OPEN, YES, Labels, read_labels, to_label
from expunge.feedback.page import Page


class Browser:
    """Asks one page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def get(self, path: str = "", **headers: str):
        request = urllib.request.Request(self.page.address + path, headers=headers)
        return urllib.request.urlopen(request, timeout=10)

    def post(self, path: str, body: object = None, **headers: str):
        data = json.dumps(body).encode() if not isinstance(body, bytes) else body
        request = urllib.request.Request(self.page.address + path, data, headers)
        return urllib.request.urlopen(request, timeout=10)

    def raw(self, method: str, path: str, host: str | None = None) -> int:
        """The status of a path that no browser would send as it stands."""
        connection = HTTPConnection("127.0.0.1", self.page.server_port, timeout=10)
        connection.putrequest(method, path, skip_host=host is not None)
        if host is not None:
            connection.putheader("Host", host)
        connection.endheaders()
        return connection.getresponse().status


@pytest.fixture
def labels(labelled: Path, tmp_path: Path) -> Labels:
    files = [*sorted((labelled / "yes").iterdir())[:2], *sorted((labelled / "no").iterdir())[:2]]
    return to_label(tmp_path / "labels.csv", files, [""] * 4)


@pytest.fixture
def browser(labels: Labels) -> Iterator[Browser]:
    with Page(labels, "Is it red?") as page:
        thread = threading.Thread(target=page.serve_forever, args=(0.02,))
        thread.start()
        yield Browser(page)
        page.shutdown()
        thread.join()


def test_the_page_needs_nothing_from_elsewhere(browser: Browser) -> None:
    with browser.get() as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in policy
    (nonce,) = {part.split('"')[0] for part in text.split('nonce="')[1:]}
    assert f"script-src 'nonce-{nonce}'" in policy
    with browser.get() as again:
        assert nonce not in again.read().decode()


def test_pictures_come_by_number(browser: Browser, labels: Labels) -> None:
    state = json.load(browser.get("state"))
    assert state == {"question": "Is it red?", "labels": [OPEN] * 4}
    with browser.get("picture/2") as answer:
        assert answer.headers["Content-Type"] == "image/png"
        served = Image.open(io.BytesIO(answer.read()))
    assert served.tobytes() == Image.open(labels.files[2]).convert("RGB").tobytes()


def test_every_press_is_on_disk_before_it_is_answered(browser: Browser, labels: Labels) -> None:
    said = [(0, YES), (1, NO), (1, OPEN), (1, YES), (3, NO)]
    seen = []
    for picture, label in said:
        browser.post("label", {"picture": picture, "label": label}).close()
        seen.append(read_labels(labels.source).labels)
    assert seen[1] == [YES, NO, OPEN, OPEN]
    assert seen[2] == [YES, OPEN, OPEN, OPEN]
    assert seen[4] == [YES, YES, OPEN, NO]
    assert [p.name for p in labels.source.parent.iterdir() if p.suffix == ".tmp"] == []


def test_what_was_said_is_there_when_the_page_is_opened_again(browser, labels) -> None:
    browser.post("label", {"picture": 2, "label": YES}).close()
    resumed = to_label(labels.source, labels.files, labels.prompts)
    with Page(resumed, "Is it red?") as page:
        assert page.address != browser.page.address
        assert page.labels.labels == [OPEN, OPEN, YES, OPEN]


@pytest.mark.parametrize(
    "path",
    ["picture/4", "picture/-1", "picture/x", "picture/", "picture/../labels.csv", "picture/0/..",
     "../../etc/passwd", "labels.csv", "%2e%2e/labels.csv", "picture/²", "picture/99999999999",
     "picture/0000000009"],
)  # fmt: skip
def test_there_is_no_way_to_another_file(browser: Browser, path: str) -> None:
    from urllib.parse import quote

    assert browser.raw("GET", f"/{browser.page.key}/{quote(path, safe='/%.')}") == 404


def test_without_the_key_there_is_nothing(browser: Browser) -> None:
    for path in ("/", "/state", "/picture/0", f"/{browser.page.key}", "/wrong/state", "state"):
        assert browser.raw("GET", path) in (400, 404), path
    assert browser.raw("POST", "/wrong/done") == 404
    assert browser.raw("PUT", f"/{browser.page.key}/label") == 501


def test_another_host_or_origin_is_refused(browser: Browser, labels: Labels) -> None:
    """A name that was pointed at this machine after the browser loaded a page from it."""
    path = f"/{browser.page.key}/state"
    port = browser.page.server_port
    assert browser.raw("GET", path, host=f"localhost:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", ""):
        assert browser.raw("GET", path, host=host) == 404, host
    with pytest.raises(urllib.error.HTTPError, match="403"):
        browser.post("label", {"picture": 0, "label": YES}, Origin="http://evil.example")
    assert labels.labels == [OPEN] * 4
    own = browser.page.address.split(f"/{browser.page.key}")[0]
    browser.post("label", {"picture": 0, "label": YES}, Origin=own).close()
    assert labels.labels[0] == YES


def test_it_listens_on_this_machine_only(browser: Browser) -> None:
    assert browser.page.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "body",
    [{"picture": 9, "label": YES}, {"picture": 0, "label": "maybe"}, {"picture": 0}, [1], None,
     b"not json", b"x" * 2000, {"picture": True, "label": YES}, {"label": YES},
     {"picture": "0000000009", "label": YES}],
)  # fmt: skip
def test_nonsense_is_refused_and_changes_nothing(browser: Browser, labels: Labels, body) -> None:
    with pytest.raises((urllib.error.HTTPError, ConnectionError), match=r"400|reset|pipe"):
        browser.post("label", body)
    assert labels.labels == [OPEN] * 4
    assert not labels.source.exists()


def test_a_corrupt_picture_does_not_stop_the_others(browser: Browser, labels: Labels) -> None:
    labels.files[1].write_bytes(b"\x89PNG torn")
    assert browser.raw("GET", f"/{browser.page.key}/picture/1") == 404
    assert browser.raw("GET", f"/{browser.page.key}/picture/2") == 200


def test_done_ends_the_serving(labels: Labels) -> None:
    with Page(labels, "?") as page:
        thread = threading.Thread(target=page.serve_forever, args=(0.02,))
        thread.start()
        Browser(page).post("done").close()
        thread.join(timeout=10)
        assert not thread.is_alive()
