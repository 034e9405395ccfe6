"""A missing extra is named."""

import math
import sys
import types

import pytest

import qwen_model
from qwen_model.common.errors import QwenModelError
from qwen_model.common.extras import import_extra, require_kernels
from tests import stand_ins


def test_module_that_is_there():
    assert import_extra("math", "arithmetic") is math


def test_module_that_is_missing():
    with pytest.raises(QwenModelError, match=r'the torch back end needs no_such_module.*"qwen-plugins\[torch\]"'):
        import_extra("no_such_module", "the torch back end")


def test_packages_are_named_as_pip_knows_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))  # a package without bindings
    with pytest.raises(QwenModelError, match=r"needs cuda-bindings, which is not installed"):
        import_extra("cuda.bindings", "the tensorrt back end", "tensorrt")


def test_a_source_tree_says_that_it_is_not_built(monkeypatch, tmp_path):
    """Of the command too: without the kernels it is one line."""
    require_kernels()
    monkeypatch.setitem(sys.modules, "qwen_plugins._core", None)
    with pytest.raises(QwenModelError, match=r"qwen-plugins is not built: pip install \."):
        require_kernels()
    with stand_ins.installed("10.14.1"):
        monkeypatch.setitem(sys.modules, "qwen_plugins._core", None)
        with pytest.raises(QwenModelError, match="is not built"):
            qwen_model.build_engine(output_dir=tmp_path / "engine", backend="tensorrt")
