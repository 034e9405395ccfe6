"""Paths that code of users may import are the same objects as at their present place."""

from importlib import import_module

import pytest

import qwen_model

FORMER_PLACES = {
    "errors": "common.errors",
    "tokenizer": "checkpoints.tokenizer",
    "config": "checkpoints.config",
    "sampling": "interface.sampling",
    "session": "engine.session",
}


@pytest.mark.parametrize("former", FORMER_PLACES)
def test_a_former_place_has_the_same_objects(former):
    old = import_module(f"qwen_model.{former}")
    new = import_module(f"qwen_model.{FORMER_PLACES[former]}")
    assert old.__all__
    assert all(getattr(old, name) is getattr(new, name) for name in old.__all__)


def test_the_package_has_what_it_names():
    assert all(getattr(qwen_model, name).__name__ == name for name in qwen_model.__all__)
    assert isinstance(qwen_model.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        qwen_model.Sesion  # noqa: B018
