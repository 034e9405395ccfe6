"""Import a back end by its name, when it is needed."""

from __future__ import annotations

from ..common.extras import import_extra, require_kernels
from ..interface.back_end import BackEnd

MODULES = {
    "torch": ("torch", "safetensors"),
    "tensorrt": ("tensorrt", "cuda.bindings", "safetensors", "ml_dtypes"),
    "tensorrt-rtx": ("tensorrt_rtx", "safetensors", "ml_dtypes"),  # and more to build, and to run
}
"""The modules that each back end needs; `pip install "qwen-plugins[NAME]"` brings them."""


def back_end(name: str) -> BackEnd:
    """Import the back end of that name.

    Raises:
        QwenModelError: something that it needs is not installed, or cannot be imported.
    """
    for module in MODULES[name]:
        import_extra(module, f"the {name} back end", extra=name)
    if name == "torch":
        from ..backends.torch import back_end as torch_back_end

        return torch_back_end
    require_kernels()
    if name == "tensorrt-rtx":
        from ..backends.tensorrt_rtx import back_end as tensorrt_rtx_back_end

        return tensorrt_rtx_back_end
    from ..backends.tensorrt import back_end as tensorrt_back_end

    return tensorrt_back_end
