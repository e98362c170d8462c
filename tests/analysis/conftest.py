"""What the tests of this room read out of a page."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest


class _Tokens(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, set[str], str | None]] = []
        self._inside, self._open = False, False

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self._inside |= tag == "div" and values.get("class") == "text"
        if self._inside and tag == "span":
            self._open = True
            self.found.append(("", set(values.get("class", "").split()), values.get("data-v")))

    def handle_data(self, data):
        if self._open:
            text, *rest = self.found[-1]
            self.found[-1] = (text + data, *rest)

    def handle_endtag(self, tag):
        self._open &= tag != "span"
        self._inside &= tag != "div"


@pytest.fixture
def tokens_of() -> Callable[[str], list[tuple[str, set[str], str | None]]]:
    """Function of a page: the (text, classes, values under the pointer) of each of its tokens."""

    def tokens(page: str):
        parser = _Tokens()
        parser.feed(page)
        return parser.found

    return tokens


@pytest.fixture
def assert_self_contained() -> Callable[[str], None]:
    """Function of a page: nothing in it would be fetched, and a policy forbids it besides."""

    def check(page: str):
        assert not re.search(r"https?:|//[a-z]|@import|\bfetch\(|XMLHttpRequest", page)
        for value in re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"', page):
            assert value.startswith(("#", "data:,")), value
        for value in re.findall(r"url\(([^)]*)\)", page):
            assert value.startswith("#"), value
        assert "default-src 'none'" in page

    return check
