"""Import a back end by its name, when it is needed."""

from __future__ import annotations

from ..common.extras import BACK_END_MODULES, import_extra, require_kernels
from ..interface.back_end import BackEnd


def back_end(name: str) -> BackEnd:
    """Import the back end of that name.

    Raises:
        QwenModelError: something that it needs is not installed, or cannot be imported.
    """
    for module in BACK_END_MODULES[name]:
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
