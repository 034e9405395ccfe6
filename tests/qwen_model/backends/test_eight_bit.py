"""Linear layers of quantized x, by PyTorch's own functions: exact sums, scales and blocks."""

import pytest
import torch

from qwen_model.backends.torch import eight_bit
from qwen_model.backends.torch.eight_bit import QuantizedTensor
from qwen_model.checkpoints.module_weights import ModuleWeights
from tests.qwen_model.eight_bit_networks import SCHEMES, Scheme


def random_module(scheme: Scheme, rows: int, columns: int, generator: torch.Generator) -> ModuleWeights[torch.Tensor]:
    blocks = (-(-rows // 128), -(-columns // 128)) if scheme.blocks else (rows, 1)
    return ModuleWeights(
        random_codes(scheme, rows, columns, generator).view(torch.int8 if scheme.kind == "int8" else torch.uint8),
        scheme.format,
        torch.randn(rows, generator=generator),
        torch.rand(blocks, generator=generator) + 0.1,
        shape=(rows, columns),
        input_scale=torch.tensor([0.25]) if scheme.static else None,
    )


def random_codes(scheme: Scheme, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    if scheme.kind == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return (torch.randn(rows, columns, generator=generator) * 40).to(torch.float8_e4m3fn)


def exact(x: QuantizedTensor, module: ModuleWeights[torch.Tensor]) -> torch.Tensor:
    """In float64, a number of the weight at a time multiplied by the scale of its block."""
    codes = module.weight if module.format.kind == "int8" else module.weight.view(torch.float8_e4m3fn)
    w = codes.double()
    for row in range(w.shape[0]):
        for column in range(0, w.shape[1], 128):
            place = (row // 128, column // 128) if module.format.group_size else (row, 0)
            w[row, column : column + 128] *= module.scales[place]
    return x.codes.double() @ w.T * x.scales + module.bias


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rows_at_a_time", [1, 1 << 24])
def test_products(monkeypatch, scheme, rows_at_a_time):
    monkeypatch.setattr(eight_bit, "BLOCK_NUMBERS", rows_at_a_time)
    generator = torch.Generator().manual_seed(0)
    module = random_module(scheme, 300, 2500, generator)
    scales = module.input_scale if scheme.static else torch.rand(5, 1, generator=generator) + 0.1
    x = QuantizedTensor(random_codes(scheme, 5, 2500, generator), scales)
    expected = exact(x, module)
    found = eight_bit.linear(x, module)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 2048, 20000])
def test_sums_of_int8_are_exact(columns):
    """Those of the largest codes, which float32 does not hold beyond 1024 columns, and of odd ones."""
    scheme = SCHEMES["int8 static"]
    x = torch.full((3, columns), -128, dtype=torch.int8)
    x[1] = 127
    x[2] = torch.randint(-127, 128, (columns,), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    w = torch.full((2, columns), 127, dtype=torch.int8)
    w[1, ::2] = -127
    module = ModuleWeights(w, scheme.format, None, torch.ones(2, 1), shape=(2, columns))
    found = eight_bit.linear(QuantizedTensor(x, torch.ones(1)), module)
    assert torch.equal(found, (x.long() @ w.long().T).float())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_chosen_tokens_keep_their_scales(scheme):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 30, generator=generator)
    whole = eight_bit.quantized(x, scheme.kind, torch.tensor([0.03]) if scheme.static else None)
    rows = torch.tensor([5, 0, 3], dtype=torch.int32)
    chosen = whole.gathered(rows)
    assert chosen.per_token == whole.per_token == (not scheme.static)
    assert torch.equal(numbers(chosen), numbers(whole)[rows])
    assert float((numbers(whole) - x).abs().max()) < (0.03 if scheme.kind == "int8" else 0.15)


def numbers(x: QuantizedTensor) -> torch.Tensor:
    return x.codes.float() * x.scales
