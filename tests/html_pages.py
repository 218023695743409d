"""Is a page whole, and what would a browser fetch for it?"""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "line", "circle", "polyline"}


class Balance(HTMLParser):
    """Every element that opens closes, in order; all that a browser might fetch is noted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
