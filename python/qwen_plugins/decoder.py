"""The former name of `qwen_plugins.attention`, kept for code that imports it."""

from qwen_plugins.attention import *  # noqa: F403
