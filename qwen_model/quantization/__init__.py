"""Quantize weights: search of scales, the tensors of quantized modules in engines, published checkpoint formats."""
