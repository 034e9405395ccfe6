"""The back ends by their names, imported when one is asked for."""

from __future__ import annotations

from ..common.extras import import_extra, require_kernels
from ..interface.back_end import BackEnd

MODULES = {
    "torch": ("torch", "safetensors"),
    "tensorrt": ("tensorrt", "cuda.bindings", "safetensors", "ml_dtypes"),
}
"""What each back end needs; the extra of the package that has its name brings it."""


def back_end(name: str) -> BackEnd:
    """The back end of that name.

    Raises:
        QwenModelError: something that it needs is not installed, or cannot be imported.
    """
    for module in MODULES[name]:
        import_extra(module, f"the {name} back end", extra=name)
    if name == "torch":
        from ..backends.torch import back_end as torch_back_end

        return torch_back_end
    require_kernels()
    from ..backends.tensorrt import back_end as tensorrt_back_end

    return tensorrt_back_end
