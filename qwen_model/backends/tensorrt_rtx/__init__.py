"""Build engines with TensorRT-RTX, on any machine; the TensorRT back end runs them, on an RTX card."""
