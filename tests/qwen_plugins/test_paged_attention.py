"""Attention over paged and 8-bit caches: pages against rows, 8 bits against float64, and what must not change a bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qwen_plugins import attention
from qwen_plugins.attention import PAGE_SIZE, AttentionInputs, split_quantized_cache
from tests.qwen_plugins.decoder_reference import Case, relative_error
from tests.qwen_plugins.test_attention import TOLERANCE, inputs_of, make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LENGTHS = [0, 1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 500, 1023, 1024, 1025]  # around tiles, pages and splits
POSITIONS = 1152  # of each sequence, a multiple of PAGE_SIZE
SHAPES = [((14, 2), size) for size in attention.HEAD_SIZES] + [((6, 6), 64), ((6, 6), 128), ((9, 1), 128)]
UNUSED_PAGE = 0


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes, as bytes, and the scales of the last dimension."""
    x = x.float()
    scales = x.abs().amax(-1) / LARGEST[dtype]
    quotients = torch.where(scales[..., None] > 0, x / scales[..., None], 0.0)
    codes = quotients.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else quotients.to(dtype)
    return codes.view(torch.uint8), scales


def dequantize(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys and values of a cache of 8 bits in float64, on the CPU."""
    codes, scales = split_quantized_cache(cache.cpu())
    return codes.contiguous().view(dtype).to(torch.float64) * scales.double()[..., None]


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return NaN on the GPU: in a cache of 8 bits all bytes of scales and codes are 0xff."""
    if dtype == torch.uint8:
        return torch.full(shape, 0xFF, dtype=dtype, device="cuda")
    return torch.full(shape, math.nan, dtype=dtype, device="cuda")


def as_stored(cache: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the cache in 8 bits, poisoned where it is NaN; with dtype None, a copy."""
    if dtype is None:
        return cache.clone()
    result = poison(*cache.shape[:-1], cache.shape[-1] + 4, dtype=torch.uint8)
    to_codes, to_scales = split_quantized_cache(result)
    codes, scales = quantize(cache.cpu(), dtype)
    known = ~scales.isnan()
    to_codes[known.cuda()] = codes[known].cuda()
    to_scales[known.cuda()] = scales[known].cuda()
    return result


def in_float64(stored: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the keys and values of a cache in float64, on the CPU."""
    return stored.double().cpu() if dtype is None else dequantize(stored, dtype)


def parts_of(cache: Tensor) -> tuple[Tensor, ...]:
    """Return tensors [..., positions, elements] that are the memory of a cache."""
    if cache.dtype != torch.uint8:
        return (cache,)
    codes, scales = split_quantized_cache(cache)
    return codes, scales[..., None]


@dataclass
class Paged:
    """Hold a pool whose pages have the rows of a cache in random order, and the page table."""

    pool: Tensor
    table: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Paged:
        count, each = len(rows), rows.shape[3] // PAGE_SIZE
        pool = poison(count * each + 4, *rows.shape[1:3], PAGE_SIZE, rows.shape[4], dtype=rows.dtype)
        generator = torch.Generator().manual_seed(count)
        numbers = 1 + torch.randperm(len(pool) - 1, generator=generator)[: count * each]
        for to, part in zip(parts_of(pool), parts_of(rows), strict=True):
            to[numbers.cuda()] = part.unflatten(3, (each, PAGE_SIZE)).movedim(3, 1).flatten(0, 1)
        return cls(pool, numbers.view(count, each).int().cuda())

    def gathered(self) -> Tensor:
        """Return the pages as rows of a cache."""
        each = self.table.shape[1]
        pages = self.pool[self.table.long()]
        shape = (len(pages), *pages.shape[2:4], each * PAGE_SIZE, pages.shape[5])
        rows = torch.empty(shape, dtype=pages.dtype, device="cuda")
        for to, part in zip(parts_of(rows), parts_of(pages), strict=True):
            to.copy_(part.movedim(1, 3).flatten(3, 4))
        return rows

    def unused(self) -> Tensor:
        """Return the pages that are in no row of the table."""
        is_used = torch.zeros(len(self.pool), dtype=torch.bool, device="cuda")
        is_used[self.table.long().flatten()] = True
        return self.pool[~is_used]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def is_poison(x: Tensor) -> bool:
    return bool((x == 0xFF if x.dtype == torch.uint8 else x.isnan()).all())


def inputs_over(case: Case, cache: Tensor | Paged, dtype: torch.dtype | None) -> AttentionInputs:
    data, table = (cache.pool, cache.table) if isinstance(cache, Paged) else (cache, None)
    return replace(inputs_of(case), kv_cache=data, pages=table, cache_dtype=dtype)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def decode(case: Case, inputs: AttentionInputs, **options: bool) -> Tensor:
    workspace = attention.decode_attention_workspace(inputs)
    return attention.decode_attention(case.qkv, inputs, ints(case.past_lengths), workspace, **options)


def prefill(case: Case, inputs: AttentionInputs) -> Tensor:
    return attention.prefill_attention(case.qkv, inputs, case.cu_seqlens, ints(case.past_lengths))


def tolerance(dtype: torch.dtype, cache_dtype: torch.dtype | None, run: object) -> float:
    # New tokens over 8 bits are computed in float16, whatever the type of qkv.
    return max(TOLERANCE[dtype], TOLERANCE[torch.float16] if cache_dtype and run is decode else 0)


def check_pages(case: Case, run, cache_dtype: torch.dtype | None) -> None:
    """Check a result over pages: the bits of that over rows, which is right, and nothing else written."""
    rows = as_stored(case.cache, cache_dtype)
    paged = Paged.of(rows)
    result = run(case, inputs_over(case, rows, cache_dtype))
    expected = case.context_over(in_float64(rows, cache_dtype))
    assert relative_error(result, expected) < tolerance(case.dtype, cache_dtype, run)
    assert same_bits(run(case, inputs_over(case, paged, cache_dtype)), result)
    assert same_bits(paged.gathered(), rows)
    assert is_poison(paged.unused())
    for row, past, new in zip(rows, case.past_lengths, case.new_tokens, strict=False):
        assert all(is_poison(part[..., past + new :, :]) for part in parts_of(row))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), SHAPES, ids=str)
def test_new_tokens(heads, head_size, dtype, cache_dtype):
    case = make_case(heads, head_size, dtype, LENGTHS, [1] * len(LENGTHS), POSITIONS, {"qk_norm": True})
    check_pages(case, decode, cache_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("past", [0, 70, 1151, 4095, 4999])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (64, 8)], ids=str)
def test_one_sequence_fills_the_gpu(heads, past, cache_dtype):
    """One sequence, split among blocks: those of a cluster where the cache is short."""
    positions = POSITIONS if past < POSITIONS else 5056
    check_pages(make_case(heads, 128, torch.float16, [past], [1], positions, {}), decode, cache_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), SHAPES, ids=str)
def test_prompts(heads, head_size, dtype, cache_dtype):
    past, new = [0, 70, 5, 400, 63, 200, 0, 0, 64], [40, 0, 130, 1, 2, 201, 0, 300, 64]
    check_pages(make_case(heads, head_size, dtype, past, new, 640, {"qk_norm": True}), prefill, cache_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [80, 128])
def test_chunks_of_prompts_have_the_bits_of_the_whole(head_size, dtype, cache_dtype):
    case = make_case((4, 2), head_size, dtype, [0, 0], [500, 300], 512, {})
    whole, parts = (Paged.of(as_stored(case.cache, cache_dtype)) for _ in range(2))
    context = prefill(case, inputs_over(case, whole, cache_dtype))
    inputs = inputs_over(case, parts, cache_dtype)
    for begin, end in ((0, 129), (129, 130), (130, 192), (192, 300)):
        rows = torch.cat([torch.arange(begin, end), 500 + torch.arange(begin, end)]).cuda()
        cu_seqlens = ints([0, end - begin, 2 * (end - begin)])
        part = attention.prefill_attention(case.qkv[rows], inputs, cu_seqlens, ints([begin, begin]))
        assert same_bits(part, context[rows])
    first = [part[:, :, :, :300] for part in parts_of(parts.gathered())]
    assert all(map(same_bits, first, [part[:, :, :, :300] for part in parts_of(whole.gathered())]))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
def test_sequences_share_pages(cache_dtype):
    """Three sequences begin with the same 128 tokens, and go on in pages of their own."""
    case = make_case((14, 2), 128, torch.float16, [128, 150, 191], [1] * 3, 256, {})
    case.cache[1:3, :, :, :128] = case.cache[0, :, :, :128]
    rows = as_stored(case.cache, cache_dtype)
    paged = Paged.of(rows)
    expected = decode(case, inputs_over(case, paged, cache_dtype))
    shared = Paged.of(rows)
    for number in shared.table[1:3, :2].flatten().tolist():
        shared.pool[number] = poison(*shared.pool.shape[1:], dtype=shared.pool.dtype)
    shared.table[1:3, :2] = shared.table[0, :2]
    assert same_bits(decode(case, inputs_over(case, shared, cache_dtype)), expected)
    assert same_bits(shared.gathered(), paged.gathered())


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
def test_padded_rows_of_new_tokens(cache_dtype):
    """Rows without a sequence write to the unused page alone, and change no bit of the others."""
    case = make_case((14, 2), 128, torch.float16, [100, 700, 3], [1] * 3, POSITIONS, {})
    rows = as_stored(case.cache, cache_dtype)
    alone, padded = Paged.of(rows), Paged.of(rows)
    expected = decode(case, inputs_over(case, alone, cache_dtype), batch_invariant=True)
    padded.table = torch.cat([padded.table[:3], padded.table.new_full((5, padded.table.shape[1]), UNUSED_PAGE)])
    inputs = inputs_over(case, padded, cache_dtype)
    inputs = replace(inputs, rotary_offsets=torch.cat([inputs.rotary_offsets, ints([0] * 5)]))
    qkv = torch.cat([case.qkv, torch.full_like(case.qkv[:1], math.nan).repeat(5, 1)])
    workspace = attention.decode_attention_workspace(inputs)
    lengths = ints([*case.past_lengths, *[0] * 5])
    result = attention.decode_attention(qkv, inputs, lengths, workspace, batch_invariant=True)
    assert same_bits(result[:3], expected)
    assert same_bits(padded.pool[1:], alone.pool[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sequences", [3, 32])
def test_padded_rows_of_prompts(sequences, dtype, cache_dtype):
    """Rows behind the last sequence, up to the size of a buffer, are not cached."""
    new = [40 + i for i in range(sequences)]
    case = make_case((4, 2), 128, dtype, [0] * sequences, new, 128, {})
    rows = as_stored(case.cache, cache_dtype)
    alone, padded = Paged.of(rows), Paged.of(rows)
    expected = prefill(case, inputs_over(case, alone, cache_dtype))
    case.qkv = torch.cat([case.qkv, torch.full_like(case.qkv[:1], math.nan).repeat(200, 1)])
    result = prefill(case, inputs_over(case, padded, cache_dtype))
    assert same_bits(result[: sum(new)], expected)
    assert same_bits(padded.pool, alone.pool)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("run", [prefill, decode])
def test_codes_and_scales(run, head_size, dtype, cache_dtype):
    """Those of a token are what NumPy's arithmetic gives for its key and value in a cache of qkv's type."""
    new = [1] * 9 if run is decode else [40, 0, 5, 70, 1, 1, 1, 1, 1]
    case = make_case((6, 2), head_size, dtype, [0] * 9, new, 128, {"qk_norm": True})
    case.qkv[1] = 0
    case.qkv[2:5] *= torch.tensor([[1e-3], [30.0], [1e-6]], dtype=dtype, device="cuda")
    exact, cache = case.cache.clone(), as_stored(case.cache, cache_dtype)
    run(case, inputs_over(case, exact, None))
    run(case, inputs_over(case, cache, cache_dtype))
    expected_codes, expected_scales = quantize(exact.cpu(), cache_dtype)
    codes, scales = split_quantized_cache(cache.cpu())
    known = ~exact[..., 0].isnan().cpu()
    negative_zero = 0x80  # of float8; no int8 code
    assert torch.equal(scales[known], expected_scales[known])
    assert torch.equal(codes[known] % negative_zero, expected_codes[known] % negative_zero)
    assert torch.equal(codes[known] > negative_zero, expected_codes[known] > negative_zero)
    assert known.sum() == 2 * 2 * len(case.qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("part", ["key", "value"])
def test_not_a_number_is_not_hidden_by_codes(part, cache_dtype, run):
    case = make_case((4, 2), 128, torch.float16, [5, 5], [1, 1], 64, {"rotary_dim": 0})
    case.qkv[1, (4 if part == "key" else 6) * 128 + 77] = math.nan
    paged = Paged.of(as_stored(case.cache, cache_dtype))
    result = run(case, inputs_over(case, paged, cache_dtype)).unflatten(1, (4, 128))
    assert result[1, :2].isnan().all()
    assert not result[0].isnan().any()
    assert not result[1, 2:].isnan().any()
    case.past_lengths = [6, 6]
    case.qkv = case.qkv.nan_to_num()
    result = run(case, inputs_over(case, paged, cache_dtype)).unflatten(1, (4, 128))
    assert result[1, :2].isnan().all()
    assert not result[1, 2:].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 300.0])
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("run", [prefill, decode])
def test_values_of_any_magnitude(run, cache_dtype, scale):
    """Scales of values multiply probabilities in float16's range; a tenth of the tokens have values of zero."""
    case = make_case((8, 2), 128, torch.bfloat16, [900, 300], [1, 1], 1024, {})
    case.cache[:, 1] *= scale
    case.cache[:, 1, :, ::10] *= 0
    case.qkv[:, -2 * 128 :] *= scale
    rows = as_stored(case.cache, cache_dtype)
    result = run(case, inputs_over(case, rows, cache_dtype))
    assert relative_error(result, case.context_over(dequantize(rows, cache_dtype))) < TOLERANCE[torch.bfloat16]


def error_of_one_scale(case: Case, exact: Tensor, dtype: torch.dtype) -> float:
    """Return the error of all but the first seven heads with one static scale for keys and one for values."""
    cache = exact.clone()
    for which in range(2):
        scale = exact[:, which].abs().nan_to_num().max() / LARGEST[dtype]
        quotients = exact[:, which] / scale
        codes = quotients.round() if dtype == torch.int8 else quotients.float().to(dtype).double()
        cache[:, which] = codes * scale
    return relative_error(case.context_over(cache)[:, 7 * 128 :], case.context_over(exact)[:, 7 * 128 :])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
def test_outlier_channels_of_keys(cache_dtype):
    """Biases of some hundreds in a few channels of one head, as Qwen2.5 has them, leave the other heads exact."""
    case = make_case((28, 4), 128, torch.float32, [0], [400], 448, {})
    keys = case.qkv[:, 28 * 128 : 32 * 128].unflatten(1, (4, 128))
    keys[:, 0, [7, 40, 100]] += torch.tensor([300.0, -200.0, 150.0], device="cuda")
    case.qkv[:, : 28 * 128] *= 0.1
    exact = case.cache.clone()
    expected = prefill(case, inputs_over(case, exact, None)).double().cpu()
    rows = as_stored(case.cache, cache_dtype)
    result = prefill(case, inputs_over(case, rows, cache_dtype))
    error = relative_error(result[:, 7 * 128 :], expected[:, 7 * 128 :])
    assert error < (0.02 if cache_dtype == torch.int8 else 0.08)
    if cache_dtype == torch.int8:
        assert error_of_one_scale(case, exact.double().cpu(), cache_dtype) > 5 * error


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (40, 4)], ids=str)
def test_batch_invariant_results_have_the_same_bits_in_every_company(heads, dtype, cache_dtype):
    lengths = [3000, 0, 1025, 513, 70, 2999, 300, 1]
    case = make_case(heads, 128, dtype, lengths, [1] * len(lengths), 3072, {})
    together = decode(case, inputs_over(case, as_stored(case.cache, cache_dtype), cache_dtype), batch_invariant=True)
    expected = None
    for i, length in enumerate(lengths):
        rows = as_stored(case.cache, cache_dtype)[i : i + 1]
        inputs = replace(inputs_over(case, rows, cache_dtype), rotary_offsets=case.rotary_offsets[i : i + 1])
        workspace = attention.decode_attention_workspace(inputs)
        alone = attention.decode_attention(case.qkv[i : i + 1], inputs, ints([length]), workspace, batch_invariant=True)
        assert same_bits(alone, together[i : i + 1])
    rows = as_stored(case.cache, cache_dtype)
    expected = decode(case, inputs_over(case, rows, cache_dtype))
    assert relative_error(together, expected) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_no_sequences():
    case = make_case((4, 4), 64, torch.float16, [3], [1], 64, {})
    paged = Paged.of(case.cache)
    inputs = replace(inputs_over(case, Paged(paged.pool, paged.table[:0]), None), rotary_offsets=None)
    workspace = attention.decode_attention_workspace(inputs)
    assert attention.decode_attention(case.qkv[:0], inputs, ints([]), workspace).shape == (0, 256)
    assert attention.prefill_attention(case.qkv[:0], inputs, ints([0])).shape == (0, 256)


def test_parts_of_a_quantized_cache():
    """Codes come first in a block, then the scales; both are views."""
    cache = torch.zeros(3, 2, 5, 64, 36, dtype=torch.uint8)
    codes, scales = split_quantized_cache(cache)
    assert codes.shape == (3, 2, 5, 64, 32)
    assert scales.shape == (3, 2, 5, 64)
    codes[1, 0, 2, 3, 4] = 7
    scales[1, 0, 2, 63] = 1.0
    block = cache[1, 0, 2].flatten()
    assert block[3 * 32 + 4] == 7
    assert block[-4:].view(torch.float32) == 1.0
    assert cache.count_nonzero() == 1 + 2  # the bytes of 7 and 1.0
