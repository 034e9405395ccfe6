"""Give vLLM's model the weights that the other implementations of benchmarks.generate have.

vLLM's own dummy weights, those of RMSNorm included, are within 0.001 of zero: activations become subnormal numbers or
zeros, with which GEMMs can run faster than with real activations.
"""

from __future__ import annotations

from typing import Any

WEIGHT_SCALE = 0.02
FP8_DEVIATION = 64.0
"""The standard deviation of codes of e4m3, whose largest is 448."""


class WorkerExtension:
    """A WorkerExtension adds methods to vLLM's worker, which makes it a base class; `LLM.collective_rpc` calls them."""

    model_runner: Any

    def fill_weights(self) -> int:
        """Fill weights as `benchmarks.generate_torch.random_weights` does, and return how many.

        Weights of one dimension become ones, the others normally distributed numbers; scales are those of codes.
        """
        count = 0
        for name, weight in self.model_runner.get_model().named_parameters():
            if name.endswith("weight_scale"):
                weight.data.fill_(WEIGHT_SCALE / FP8_DEVIATION)
            elif weight.element_size() == 1:
                # Row by row: normal_ has no 8-bit types, and the weight need not be contiguous.
                for row in weight.data:
                    row.copy_((row.float().normal_(0.0, FP8_DEVIATION)).clamp_(-448, 448))
            elif weight.dim() == 1:
                weight.data.fill_(1.0)
            else:
                weight.data.normal_(0.0, WEIGHT_SCALE)
            count += 1
        return count
