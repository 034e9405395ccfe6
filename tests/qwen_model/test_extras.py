"""A missing extra is named."""

import math

import pytest

from qwen_model.errors import QwenModelError
from qwen_model.extras import import_extra


def test_module_that_is_there():
    assert import_extra("math", "arithmetic") is math


def test_module_that_is_missing():
    with pytest.raises(QwenModelError, match=r'the torch back end needs no_such_module.*"qwen-plugins\[torch\]"'):
        import_extra("no_such_module", "the torch back end")
