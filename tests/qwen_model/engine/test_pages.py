"""Pages are counted, found by what they hold, and given out again when nobody uses them."""

import pytest

from qwen_model.engine.pages import PagePool, extend_names
from qwen_model.interface.device import UNUSED_PAGE


def names_of(tokens: list[int], salt: bytes = b"", size: int = 4) -> list[bytes]:
    names: list[bytes] = []
    extend_names(names, tokens, size, salt)
    return names


def test_the_unused_page_is_never_given_out():
    pool = PagePool(5, 4)
    assert pool.num_free == 4
    assert UNUSED_PAGE not in pool.allocate(4)
    assert pool.num_free == 0


def test_a_page_is_free_when_its_last_user_leaves():
    pool = PagePool(5, 4)
    pages = pool.allocate(2)
    pool.share(pages[:1])
    assert [pool.users(page) for page in pages] == [2, 1]
    pool.release(pages)
    assert pool.num_free == 3
    pool.release(pages[:1])
    assert pool.num_free == 4


@pytest.mark.parametrize(("positions", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_of_positions(positions, pages):
    assert PagePool(5, 4).pages_of(positions) == pages


def test_names_depend_on_all_tokens_before_and_on_the_salt():
    tokens = list(range(11))
    names = names_of(tokens)
    assert len(names) == 2
    assert names_of(tokens[:8]) == names
    assert names_of([*tokens[:7], 99])[:1] == names[:1]
    assert names_of([*tokens[:7], 99])[1] != names[1]
    assert names_of([99, *tokens[1:]])[1] != names[1]
    assert not set(names_of(tokens, b"salt")) & set(names)


def test_free_pages_are_found_until_they_are_given_out():
    pool = PagePool(4, 4)
    names = names_of(list(range(8)))
    pages = pool.allocate(2)
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    assert pool.find(names) == pages
    pool.release(pages)
    assert pool.find(names) == pages
    assert pool.allocate(1) == [3]  # one that never held anything
    assert pool.allocate(1) == [pages[1]]  # the last of a sequence before those in front of it
    assert pool.find(names) == pages[:1]
    pool.share(pages[:1])
    assert (pool.users(pages[0]), pool.num_free) == (1, 0)


def test_pages_that_were_used_last_are_kept_longest():
    pool = PagePool(4, 4)
    pages = pool.allocate(3)
    for number, page in enumerate(pages):
        pool.name(page, bytes([number]))
    for place in (1, 2, 0):
        pool.release([pages[place]])
    pool.share([pages[1]])
    pool.release([pages[1]])
    assert [pool.allocate(1)[0] for _ in range(3)] == [pages[2], pages[0], pages[1]]


def test_the_first_page_of_a_name_is_kept():
    pool = PagePool(4, 4)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([second])
    assert pool.allocate(1) == [second]
    assert pool.find([b"a"]) == [first]


def test_what_is_forgotten_is_not_found_and_can_be_named_again():
    pool = PagePool(4, 4)
    names = names_of(list(range(8)))
    pages = pool.allocate(2)
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    pool.release(pages[1:])
    pool.forget()
    assert pool.find(names) == []
    again = pool.allocate(1)
    pool.name(again[0], names[0])
    assert pool.find(names) == again
    pool.release(pages[:1] + again)
    assert pool.num_free == 3
