"""Hold what several tests of TensorRT share."""
