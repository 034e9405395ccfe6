"""Paths that code of users may import are the same objects as at their present place."""

from importlib import import_module

import pytest

import qwen_model

FORMER_PLACES = ("errors", "tokenizer", "config", "sampling", "session")


@pytest.mark.parametrize("former", FORMER_PLACES)
def test_a_former_place_has_the_same_objects(former):
    old = import_module(f"qwen_model.{former}")
    assert old.__all__
    for name in old.__all__:
        present = import_module(getattr(old, name).__module__)
        assert present is not old
        assert getattr(present, name) is getattr(old, name)


def test_the_package_has_what_it_names():
    assert all(getattr(qwen_model, name).__name__ == name for name in qwen_model.__all__)
    assert isinstance(qwen_model.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        qwen_model.Sesion  # noqa: B018
