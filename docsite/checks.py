"""Checks of the finished pages: every link leads somewhere, nothing is fetched, and Markdown became what was meant."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Tags that a page may hold; anything else is a formula or a placeholder that was taken for markup.
_TAGS = (
    "a abbr article aside b blockquote body br button circle code col dd del details div dl dt em figure footer form g h1 h2 h3 h4 "
    "h5 h6 head header hr html img input kbd label li line link main mark meta nav ol p path pre rect script small span strong style "
    "sub summary sup svg table tbody td template th thead title tr ul"
)
KNOWN = set(_TAGS.split())
FETCHES = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
SHOWN = {"icon", "stylesheet", "preload", "preconnect", "dns-prefetch", "modulepreload"}  # links that a browser follows
# A line that opens a list, a table, a heading or a fence in a paragraph's middle.
_LOST = re.compile(r"^(?:[-*] |\d+\. |\|.*\|$|```|#+ )", re.M)


class Page(HTMLParser):
    """What one page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.paragraphs: list[str] = []
        self._open = False
        self._code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag's name, address and id."""
        given = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        address = given.get(FETCHES.get(tag, ""), "")
        if address and (tag != "link" or SHOWN & set(given.get("rel", "").split())):
            self.fetched.append(address)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self._code += tag in ("code", "pre")
        if tag == "p":
            self.paragraphs.append("")
        self._open = self._open or tag == "p"

    def handle_endtag(self, tag: str) -> None:
        """The end of a paragraph or of code."""
        self._code -= tag in ("code", "pre")
        if tag == "p":
            self._open = False

    def handle_data(self, data: str) -> None:
        """Text of a paragraph; code in it counts as a letter."""
        if self._open:
            self.paragraphs[-1] += "x" if self._code else data


def faults(site: Path) -> list[str]:
    """What is wrong with the pages of a site, a line each."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    return [f"{path.relative_to(site)}: {fault}" for path in pages for fault in _faults(path, pages, site)]


def _faults(path: Path, pages: dict[Path, Page], site: Path) -> Iterator[str]:
    page = pages[path]
    for address in page.links:
        yield from _broken(address, path, pages, site)
    for address in page.fetched:
        if urlsplit(address).scheme not in ("", "data") or urlsplit(address).netloc:
            yield f"fetches {address}"
        else:
            yield from _broken(address, path, pages, site)
    yield from (f"<{tag}> is no tag of HTML" for tag in sorted(page.tags - KNOWN))
    yield from (
        f"markup in a paragraph: {text.strip()[:80]!r}" for text in page.paragraphs if _LOST.search(text.strip())
    )


def _broken(address: str, path: Path, pages: dict[Path, Page], site: Path) -> Iterator[str]:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return
    file = (
        path
        if not parts.path
        else (site if parts.path.startswith("/") else path.parent) / unquote(parts.path).lstrip("/")
    )
    file = file.resolve()
    file = file / "index.html" if file.is_dir() else file
    if not file.exists():
        yield f"leads to {address}, which is not there"
    elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids | {"__top"}:
        yield f"leads to {address}, a page without that heading"
