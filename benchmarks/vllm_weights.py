"""Give vLLM's model the weights that the other implementations of benchmarks.generate have.

vLLM's own dummy weights, those of RMSNorm included, are within 0.001 of zero: activations become subnormal numbers or
zeros, with which GEMMs can run faster than with real activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEIGHT_SCALE = 0.02
LARGEST_INPUT = 8.0
"""The largest magnitude of x that static scales are for: RMSNorm gives numbers of about 1."""
FP8_DEVIATION = 64.0
"""The standard deviation of codes of e4m3, whose largest is 448."""
CODES = ("qweight", "weight_packed")
SCALES = ("scales", "weight_scale", "weight_scale_inv")


def fill_codes(weight: Tensor, bits: int) -> float:
    """Fill a weight with random codes of 4 or 8 bits; return the standard deviation of what they stand for.

    The mean is 0. With the code of the lowest number it would be half a step below: then activations grow by thousands
    in each layer of a 7B model, and overflow float16.

    weight: int32, words of codes whose zero point is in the middle; int8; or fp8 (e4m3), also as bytes.
    """
    if weight.dtype in (torch.uint8, torch.float8_e4m3fn):
        numbers = torch.empty(weight.shape, dtype=torch.float16, device=weight.device).normal_(0.0, FP8_DEVIATION)
        weight.view(torch.float8_e4m3fn).copy_(numbers.clamp_(-448, 448))
        return FP8_DEVIATION
    if weight.dtype == torch.int8:
        weight.random_(-127, 128)
    else:
        weight.zero_()
        for shift in range(0, 32, bits):
            weight |= torch.randint_like(weight, 1, 1 << bits) << shift
    return float(((2**bits - 1) ** 2 - 1) / 12) ** 0.5


class WorkerExtension:
    """A WorkerExtension adds methods to vLLM's worker, which makes it a base class; `LLM.collective_rpc` calls them."""

    model_runner: Any

    def fill_weights(self) -> int:
        """Fill weights as `benchmarks.generate_torch.random_weights` does, and return how many.

        Weights of one dimension become ones, the others normally distributed numbers, or codes with constant scales.
        Other integers, such as the order of columns, stay as they are.
        """
        count = 0
        for module in self.model_runner.get_model().modules():
            tensors = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
            deviation, largest_code = 1.0, 448.0
            for name, weight in tensors.items():
                if name in CODES:
                    elements = module.input_size_per_partition * module.output_size_per_partition
                    deviation = fill_codes(weight, 32 * weight.numel() // elements)
                elif weight.dtype in (torch.int8, torch.float8_e4m3fn):
                    deviation = fill_codes(weight, 8)
                    largest_code = 127.0 if weight.dtype == torch.int8 else 448.0
            for name, weight in tensors.items():
                if name in SCALES:
                    weight.fill_(WEIGHT_SCALE / deviation)
                elif name == "input_scale":
                    weight.fill_(LARGEST_INPUT / largest_code)
                elif name == "qzeros":
                    weight.fill_(0x88888888 - (1 << 32))
                elif weight.is_floating_point() and weight.itemsize > 1:
                    weight.fill_(1.0) if weight.dim() <= 1 else weight.normal_(0.0, WEIGHT_SCALE)
            count += len(tensors)
        return count
