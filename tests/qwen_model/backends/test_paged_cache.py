"""Pages of keys and values on a CPU: 8-bit codes beside a NumPy writing of them, and where they lie in memory."""

import numpy as np
import pytest
import torch

from qwen_model.backends.torch.paged_cache import PagedCache, quantize
from qwen_model.checkpoints.config import RotaryConfig
from qwen_model.interface.memory import page_bytes
from tests.qwen_model.small_config import small_config

CONFIG = small_config(head_size=16, rotary=RotaryConfig(dim=16))
# Every positive number of e4m3 by its code; 127 is NaN.
E4M3 = np.array(
    [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)], np.float32
)[:127]


def codes_in_numpy(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes as uint8 and scales, by the definition: the nearest code of x / scale, of two the even one."""
    scales = (np.abs(x).max(-1) / np.float32(127 if kind == "int8" else 448)).astype(np.float32)
    divided = x / np.where(scales == 0, np.float32(1), scales)[..., None]
    if kind == "int8":
        return np.clip(np.rint(divided), -127, 127).astype(np.int8).view(np.uint8), scales
    distance = np.abs(np.abs(divided)[..., None] - E4M3)
    even_first = np.array([*range(0, 127, 2), *range(1, 127, 2)])
    codes = even_first[distance[..., even_first].argmin(-1)]
    return np.where(np.signbit(divided), codes + 128, codes).astype(np.uint8), scales


def test_e4m3_is_as_pytorch_has_it():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(codes, E4M3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes(kind):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 24)).astype(np.float32) * np.exp(generator.uniform(-9, 9, (500, 1)))
    x = x.astype(np.float32)
    x[3] = 0.0
    x[4, 1:] = 0.0
    # Halves between codes: the largest makes the scale 1.
    x[5] = [127 if kind == "int8" else 448, 0.5, 1.5, 2.5, -0.5, -1.5, 17, 19, 21, 23, 25, *[0.0] * 13]
    codes, scales = quantize(torch.from_numpy(x), kind)
    expected, expected_scales = codes_in_numpy(x, kind)
    assert np.array_equal(scales.numpy(), expected_scales)
    zero = (codes.numpy() & 0x7F == 0) & (expected & 0x7F == 0) if kind == "fp8" else False  # of either sign
    assert ((codes.numpy() == expected) | zero).all()
    assert scales[3] == 0
    assert not codes[3].any()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(kind, bad):
    """A choice from its logits must find it."""
    cache = PagedCache(CONFIG, 2, torch.float32, kind, torch.device("cpu"))
    k = torch.ones(1, 2, 16)
    k[0, 1, 7] = bad
    cache.write(0, k, torch.ones(1, 2, 16), torch.tensor([1]), torch.tensor([9]))
    read = cache.read(0, torch.tensor([[1]]))[0, :, :, 9]
    assert not read[0, 1, 7].isfinite()
    assert read[0, 0].isfinite().all()
    assert read[1].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_block_is_its_codes_and_then_their_scales(kind):
    cache = PagedCache(CONFIG, 5, torch.float16, kind, torch.device("cpu"))
    assert cache.data.nbytes == 5 * page_bytes(CONFIG, "float16", kind)
    k, v = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(0)).half()
    cache.write(1, k, v, torch.tensor([4, 4, 2]), torch.tensor([62, 63, 0]))
    blocks = cache.data.numpy()  # [layers, num_pages, 2, kv_heads, bytes]
    for token, (page, offset) in enumerate([(4, 62), (4, 63), (2, 0)]):
        for part, x in enumerate((k, v)):
            for head in range(2):
                codes, scales = codes_in_numpy(x[token, head].float().numpy()[None], kind)
                block = blocks[1, page, part, head]
                assert np.array_equal(block[offset * 16 : (offset + 1) * 16], codes[0])
                assert block[64 * 16 :].view(np.float32)[offset] == scales[0]
    assert not blocks[0].any()


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_pages_are_read_in_the_order_asked_for_and_copied(kind):
    cache = PagedCache(CONFIG, 6, torch.float32, kind, torch.device("cpu"))
    k, v = torch.randn(2, 128, 2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(128)
    for layer in range(2):
        cache.write(layer, k + layer, v - layer, torch.tensor([5, 1])[positions // 64], positions % 64)
    expected = [cache.read(layer, torch.tensor([[5, 1]])) for layer in range(2)]
    tolerance = {"auto": 0.0, "int8": 0.02, "fp8": 0.15}[kind]
    assert (expected[1][0, 0].transpose(0, 1) - (k + 1)).abs().max() <= tolerance
    assert (expected[1][0, 1].transpose(0, 1) - (v - 1)).abs().max() <= tolerance
    cache.copy_pages([(5, 2), (1, 3)])
    for layer in range(2):
        assert torch.equal(cache.read(layer, torch.tensor([[2, 3], [5, 1]])), expected[layer].repeat(2, 1, 1, 1, 1))
