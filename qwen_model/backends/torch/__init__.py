"""Run engines with PyTorch on any device; on an NVIDIA GPU with the kernels of qwen_plugins."""
