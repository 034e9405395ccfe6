"""Leave out the tests that compare with PyTorch where it is not installed, as beside TensorRT 8.6."""

import importlib.util

NEED_TORCH = (
    "comparison/test_architectures.py",
    "comparison/test_faults.py",
    "comparison/test_kernel_operations.py",
    "comparison/test_reference_file.py",
    "comparison/test_tensorrt_stand_in.py",
    "comparison/test_torch_gpu.py",
    "test_original.py",
)
collect_ignore = [] if importlib.util.find_spec("torch") else list(NEED_TORCH)
