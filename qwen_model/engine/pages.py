"""Give out the pages of the key-value cache, count who uses each, and find those that hold given tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ..interface.device import UNUSED_PAGE


class PagePool:
    """Count the users of each page. A page that nobody uses keeps its content, and its name, until it is given out.

    A name says what a full page holds, see `extend_names`. The page that was used least recently is given out first.
    """

    def __init__(self, num_pages: int, page_size: int):
        """Begin with all pages free; UNUSED_PAGE is never given out."""
        self.num_pages, self.page_size = num_pages, page_size
        self._users = [0] * num_pages
        self._free = OrderedDict.fromkeys(page for page in range(num_pages) if page != UNUSED_PAGE)
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Return how many pages nobody uses."""
        return len(self._free)

    def users(self, page: int) -> int:
        """Return how many sequences use a page."""
        return self._users[page]

    def pages_of(self, positions: int) -> int:
        """Return how many pages hold so many positions."""
        return -(-positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Give out pages for one user; there must be as many free ones."""
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._users[page] = 1
            if (name := self._names.pop(page, None)) is not None:
                del self._named[name]
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a user to each page, which may be free."""
        for page in pages:
            self._users[page] += 1
            self._free.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Remove a user from each page of a sequence; of those that become free its last page is given out first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None
                if page not in self._names:  # worth nothing to anybody
                    self._free.move_to_end(page, last=False)

    def name(self, page: int, name: bytes) -> None:
        """Remember what a full page holds, unless another page of that name is remembered."""
        if page not in self._names and self._named.setdefault(name, page) == page:
            self._names[page] = name

    def forget(self) -> None:
        """Let no page be found by what it holds now."""
        self._names.clear()
        self._named.clear()

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Return the pages of these names, up to the first that there is none of."""
        pages = []
        for name in names:
            if (page := self._named.get(name)) is None:
                break
            pages.append(page)
        return pages


def extend_names(names: list[bytes], tokens: Sequence[int], page_size: int, salt: bytes) -> None:
    """Append the names of the full pages of tokens that have none yet.

    A name is a hash of all tokens up to the page's end and of the salt: pages of other salts are never found.
    """
    for start in range(len(names) * page_size, len(tokens) - page_size + 1, page_size):
        before = names[-1] if names else hashlib.blake2b(salt).digest()
        page = array("q", tokens[start : start + page_size]).tobytes()
        names.append(hashlib.blake2b(before + page, digest_size=32).digest())
