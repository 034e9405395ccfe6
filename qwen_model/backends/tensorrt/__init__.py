"""The TensorRT back end: an engine is a plan with the weights inside. It needs no PyTorch."""
