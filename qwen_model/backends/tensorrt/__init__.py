"""Build and run engines with TensorRT, without PyTorch; an engine is a plan that holds the weights."""
