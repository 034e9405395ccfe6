"""The PyTorch back end: runs on any device, on an NVIDIA GPU by the kernels of qwen_plugins."""
