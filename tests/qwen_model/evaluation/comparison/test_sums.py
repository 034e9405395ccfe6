"""Which errors of sums in float32 are no fault."""

from __future__ import annotations

import numpy as np

from qwen_model.checkpoints.config import ModelConfig
from qwen_model.compare import default_prompt
from qwen_model.evaluation.comparison.errors import LIMIT, error_of
from qwen_model.evaluation.comparison.make_reference import make_reference
from qwen_model.evaluation.comparison.reference import CheckpointModules
from qwen_model.packaged_model import packaged_model_dir


def test_the_order_of_a_sum_is_no_fault():
    """Products that are added one after the other have the largest error; PyTorch's own can be small by chance."""
    model = ModelConfig.from_model_dir(packaged_model_dir())
    reference = make_reference(packaged_model_dir(), default_prompt(model.vocab_size), 0, ["float32"])
    modules = CheckpointModules(packaged_model_dir(), model, "numpy")
    for layer in range(model.num_layers):
        case = reference.case(f"layers.{layer}.mlp.down", 0, modules.arrays)
        x, weight = (array.astype(np.float32) for array in (case.linear_input[1], case.module(case.name)[0]))
        y = np.zeros((len(x), len(weight)), np.float32)
        for column in range(x.shape[1]):
            y += x[:, column, None] * weight[:, column]
        own = reference.own["float32"].isolated[0][case.name]
        assert error_of(y, case.values[case.name]).ratio(own, "float32") < LIMIT
        rounded = x.astype(np.float16).astype(np.float32) @ weight.T
        assert error_of(rounded, case.values[case.name]).ratio(own, "float32") > LIMIT
