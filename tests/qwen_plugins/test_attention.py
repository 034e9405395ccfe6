"""Attention of prompts and of new tokens against float64; arguments that are refused."""

from dataclasses import replace

import pytest
import torch

from qwen_plugins import attention
from tests.qwen_plugins.decoder_reference import Case, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HEADS = [(1, 1), (6, 6), (8, 4), (6, 2), (28, 4), (14, 1), (32, 2)]
VARIANTS = [
    {},
    {"qk_norm": True},
    {"logn": True},
    {"qk_norm": True, "logn": True, "part": 2},
    {"part": 4},
    {"rotary_style": "gptj"},
    {"rotary_style": "gptj", "qk_norm": True, "part": 2},
    {"rotary_dim": 6},
    {"rotary_dim": 0, "logn": True},
]


def inputs_of(case: Case) -> attention.AttentionInputs:
    return attention.AttentionInputs(
        num_heads=case.num_heads,
        kv_cache=case.cache,
        rotary_table=case.rotary_table,
        rotary_offsets=case.rotary_offsets,
        rotary_style=case.rotary_style,
        query_scale=case.query_scale,
        q_norm=case.q_norm,
        k_norm=case.k_norm,
        norm_eps=case.norm_eps,
    )


def make_case(heads, head_size, dtype, past_lengths, new_tokens, max_positions, variant, seed=0, device="cuda") -> Case:
    options = dict(variant)
    rotary_dim = options.pop("rotary_dim", head_size // options.pop("part", 1))
    return Case(
        *heads,
        head_size,
        rotary_dim,
        dtype,
        past_lengths,
        new_tokens,
        max_positions,
        device=device,
        seed=seed,
        **options,
    )


def run_prefill(case: Case) -> torch.Tensor:
    past = None
    if any(case.past_lengths):
        past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    shape = (len(case.qkv), case.num_heads * case.head_size)
    out = torch.full(shape, float("nan"), dtype=case.dtype, device="cuda")
    return attention.prefill_attention(case.qkv, inputs_of(case), case.cu_seqlens, past, out=out)


def run_decode(case: Case, workspace=None) -> torch.Tensor:
    inputs = inputs_of(case)
    workspace = attention.decode_attention_workspace(inputs) if workspace is None else workspace
    past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    out = torch.full((len(past), case.num_heads * case.head_size), float("nan"), dtype=case.dtype, device="cuda")
    return attention.decode_attention(case.qkv, inputs, past, workspace, out=out)


def check_prefill(case: Case) -> None:
    expected, cache = case.reference()
    before = case.qkv.clone()
    assert relative_error(run_prefill(case), expected) < TOLERANCE[case.dtype]
    # Where there should be no token the cache is NaN still.
    assert relative_error(case.cache, cache) < TOLERANCE[case.dtype]
    assert torch.equal(case.qkv, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill_attention(head_size, dtype, variant):
    """Ragged prompts around the sizes of tiles, one of them as long as the cache."""
    check_prefill(make_case((6, 2), head_size, dtype, [0] * 8, [5, 1, 17, 64, 65, 128, 131, 300], 300, variant))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_prefill_after_past_tokens(heads, head_size, dtype):
    """Parts of prompts: short and long ones after short and long pasts, and sequences without new tokens."""
    past, new = [0, 70, 5, 400, 63, 200, 0], [40, 0, 130, 1, 2, 201, 0]
    check_prefill(make_case(heads, head_size, dtype, past, new, 401, {}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_short_prompts(dtype):
    """More sequences than a warp has lanes, some of them empty."""
    lengths = [(7 * i) % 23 for i in range(150)]
    check_prefill(make_case((4, 2), 64, dtype, [i % 3 for i in range(150)], lengths, 32, {}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_prompt(dtype):
    check_prefill(make_case((2, 1), 128, dtype, [0], [3001], 3001, {"qk_norm": True}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_of_a_prompt_are_as_the_whole(dtype):
    whole = make_case((4, 2), 128, dtype, [0, 0], [500, 300], 512, {})
    parts = make_case((4, 2), 128, dtype, [0, 0], [500, 300], 512, {})
    context = run_prefill(whole)
    for begin, end in ((0, 129), (129, 130), (130, 300)):
        rows = torch.cat([torch.arange(begin, end), 500 + torch.arange(begin, end)]).cuda()
        size = end - begin
        cu_seqlens = torch.tensor([0, size, 2 * size], dtype=torch.int32, device="cuda")
        past = torch.tensor([begin, begin], dtype=torch.int32, device="cuda")
        part = attention.prefill_attention(parts.qkv[rows], inputs_of(parts), cu_seqlens, past)
        assert relative_error(part, context[rows]) < TOLERANCE[dtype]
    torch.testing.assert_close(parts.cache[:2, :, :, :300], whole.cache[:2, :, :, :300], rtol=0, atol=0)


@pytest.mark.gpu
def test_scores_too_large_for_their_exponentials():
    """Softmax subtracts the maximum, of the present tile and of those before it. Nothing is rounded before."""
    case = make_case((2, 2), 64, torch.float16, [0], [200], 200, {"rotary_dim": 0})
    case.qkv *= 16
    check_prefill(case)


@pytest.mark.gpu
def test_projections_in_wider_rows():
    case = make_case((4, 2), 128, torch.bfloat16, [0, 0], [40, 33], 64, {})
    wide = torch.cat([case.qkv, torch.full_like(case.qkv, float("nan"))], 1)
    expected, _ = case.reference()
    case.qkv = wide[:, : case.qkv.shape[1]]
    assert relative_error(run_prefill(case), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3], VARIANTS[5]], ids=str)
def test_decode_attention(head_size, dtype, heads, variant):
    past_lengths = [0, 1, 63, 64, 65, 500, 299]
    case = make_case(heads, head_size, dtype, past_lengths, [1] * 7, 501, variant)
    expected, cache = case.reference()
    assert relative_error(run_decode(case), expected) < TOLERANCE[dtype]
    assert relative_error(case.cache, cache) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("past", [0, 7, 4095, 9000, 9999])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)], ids=str)
def test_one_sequence_fills_the_gpu(dtype, past, heads):
    case = make_case(heads, 128, dtype, [past], [1], 10_000, {})
    expected, _ = case.reference()
    assert relative_error(run_decode(case), expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("heads", [(6, 6), (4, 2), (6, 2), (28, 4), (9, 1)], ids=str)
def test_whole_and_split_sequences(head_size, dtype, heads):
    """Lengths on both sides of where the kernel begins to split a sequence among blocks."""
    past_lengths = [0, 511, 513, 700, 1281, 1999]
    case = make_case(heads, head_size, dtype, past_lengths, [1] * 6, 2000, {"qk_norm": True})
    expected, cache = case.reference()
    assert relative_error(run_decode(case), expected) < TOLERANCE[dtype]
    assert relative_error(case.cache, cache) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "past_lengths"),
    [((28, 4), [2047, 64, 320, 321]), ((64, 8), [65, 2047]), ((32, 8), [0, 2047, 1000, 2047]), ((40, 8), [2046, 2047])],
    ids=str,
)
def test_the_splits_of_a_short_cache_meet_in_a_cluster(heads, past_lengths, dtype):
    """Clusters of several sizes, of which each block combines several heads; the cache full to its last row."""
    case = make_case(heads, 128, dtype, past_lengths, [1] * len(past_lengths), 2048, {})
    expected, cache = case.reference()
    first = run_decode(case)
    assert relative_error(first, expected) < TOLERANCE[dtype]
    assert relative_error(case.cache, cache) < TOLERANCE[dtype]
    assert torch.equal(run_decode(case), first)


@pytest.mark.gpu
def test_variants_of_decode_attention():
    for variant in VARIANTS:
        case = make_case((14, 2), 64, torch.float32, [3, 700], [1, 1], 701, variant)
        expected, _ = case.reference()
        assert relative_error(run_decode(case), expected) < TOLERANCE[torch.float32]


@pytest.mark.gpu
def test_a_workspace_serves_every_batch_size():
    """Counters and partial results of batches of other sizes do not get in each other's way."""
    big = make_case((8, 2), 64, torch.float32, [900] * 9, [1] * 9, 1000, {})
    workspace = attention.decode_attention_workspace(inputs_of(big))
    for count in (1, 9, 2, 5, 1, 9):
        past_lengths = [100 * i + 1 for i in range(count)]
        case = make_case((8, 2), 64, torch.float32, past_lengths, [1] * count, 1000, {}, seed=count)
        case.cache = torch.cat([case.cache, case.cache.new_zeros(10 - len(case.cache), *case.cache.shape[1:])])
        expected, _ = case.reference()
        assert relative_error(run_decode(case, workspace), expected) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("past_lengths", [[3000, 2100], [40, 200, 900] * 20], ids=["long", "many"])
def test_what_other_launches_leave_in_shared_memory_does_not_matter(past_lengths):
    """Seven heads share keys, and a block has room for eight: the bits of the results are always the same."""
    ones = [1] * len(past_lengths)
    case = make_case((28, 4), 128, torch.float16, past_lengths, ones, 3072, {})
    other = make_case((32, 4), 128, torch.float16, past_lengths, ones, 3072, {}, seed=1)
    other.qkv *= 40
    first = run_decode(case)
    for _ in range(5):
        run_decode(other)
        assert torch.equal(run_decode(case), first)


@pytest.mark.gpu
def test_a_graph_follows_the_lengths():
    """One capture; then each replay appends a token and attends to one more."""
    case = make_case((8, 2), 128, torch.float16, [0, 250], [1, 1], 600, {})
    inputs = inputs_of(case)
    workspace = attention.decode_attention_workspace(inputs)
    past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    out = torch.empty(2, 8 * 128, dtype=torch.float16, device="cuda")
    attention.decode_attention(case.qkv, inputs, past, workspace, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.decode_attention(case.qkv, inputs, past, workspace, out=out)
    for _ in range(300):
        expected, _ = case.reference()
        graph.replay()
        if case.past_lengths[0] % 60 == 0:
            assert relative_error(out, expected) < TOLERANCE[torch.float16]
        case.past_lengths = [length + 1 for length in case.past_lengths]
        case.positions += 1
        past += 1
        case.qkv.copy_(torch.randn_like(case.qkv))


@pytest.mark.gpu
def test_no_sequences():
    case = make_case((4, 4), 64, torch.float16, [3], [1], 8, {})
    inputs = inputs_of(case)
    empty = attention.AttentionInputs(4, case.cache, case.rotary_table)
    past = torch.empty(0, dtype=torch.int32, device="cuda")
    workspace = attention.decode_attention_workspace(inputs)
    assert attention.decode_attention(case.qkv[:0], empty, past, workspace).shape == (0, 256)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert attention.prefill_attention(case.qkv[:0], empty, cu_seqlens).shape == (0, 256)


def arguments(**changed):
    """Return a prompt of two tokens on a CPU: it is refused for that, after all other checks."""
    case = make_case((4, 2), 64, torch.float16, [0], [2], 8, {}, device="cpu")
    given = {"qkv": case.qkv, "cu_seqlens": case.cu_seqlens}
    inputs = {"num_heads": 4, "kv_cache": case.cache, "rotary_table": case.rotary_table}
    for name, value in changed.items():
        (given if name in ("qkv", "cu_seqlens", "past_lengths", "softmax_scale", "out") else inputs)[name] = value
    return given | {"inputs": attention.AttentionInputs(**inputs)}


INTS = torch.zeros(2, dtype=torch.int32)
QKV = torch.zeros(2, 512, dtype=torch.float16)
CACHE = torch.zeros(2, 2, 2, 8, 64, dtype=torch.float16)
BYTES = torch.zeros(2, 2, 2, 8, 68, dtype=torch.uint8)
PAGES = torch.zeros(1, 3, dtype=torch.int32)
TABLE = torch.zeros(8, 64)
WEIGHT = torch.zeros(64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"qkv": [1.0]}, TypeError, r"qkv must be a torch\.Tensor, not list"),
        ({"qkv": QKV.double()}, TypeError, "qkv must be float16, bfloat16 or float32, not float64"),
        ({"qkv": QKV[:, 1:]}, ValueError, "qkv must have 512 columns, not 511"),
        ({"qkv": QKV[0]}, ValueError, "qkv must have 2 dimensions, not 1"),
        ({"qkv": torch.zeros(512, 2).half().t()}, ValueError, "last dimension of qkv must be contiguous"),
        ({"qkv": QKV.clone().requires_grad_()}, ValueError, "qkv requires gradients"),
        ({"qkv": QKV.float()}, TypeError, "kv_cache must be float32 like qkv, not float16"),
        ({"kv_cache": CACHE[0]}, ValueError, r"kv_cache must have the shape \(rows, 2, kv_heads, .*, not \(2, 2"),
        ({"kv_cache": CACHE.transpose(0, 1)}, ValueError, "kv_cache must be contiguous"),
        ({"kv_cache": CACHE.to("meta")}, ValueError, "kv_cache must be on the device of the first argument, cpu, not"),
        ({"kv_cache": CACHE[..., :40].contiguous()}, ValueError, r"head_size must be one of \(32, .* 256\), not 40"),
        ({"cache_dtype": torch.int16}, TypeError, "cache_dtype must be None, int8 or float8_e4m3fn, not int16"),
        ({"cache_dtype": "int8"}, TypeError, "cache_dtype must be None, int8 or float8_e4m3fn, not int8"),
        ({"cache_dtype": torch.int8}, TypeError, "kv_cache must be uint8 like all caches of int8, not float16"),
        ({"cache_dtype": torch.int8, "kv_cache": BYTES[0]}, ValueError, r"max_positions, head_size \+ 4\), not \(2, 2"),
        (
            {"cache_dtype": torch.int8, "kv_cache": BYTES},
            ValueError,
            "8 bits must have a multiple of 64 positions, not 8",
        ),
        ({"pages": [[0]]}, TypeError, r"pages must be a torch\.Tensor, not list"),
        ({"pages": PAGES.long()}, TypeError, "pages must be int32, not int64"),
        ({"pages": PAGES[0]}, ValueError, r"pages must have the shape \(sequences, pages of each\), not \(3,\)"),
        ({"pages": PAGES[:, :0]}, ValueError, r"pages must have the shape \(sequences, pages of each\), not \(1, 0\)"),
        ({"pages": PAGES.repeat(2, 2)[:, ::2]}, ValueError, "the last dimension of pages must be contiguous"),
        ({"pages": PAGES}, ValueError, "kv_cache must have rows of 64 positions with pages, not of 8"),
        ({"num_heads": "4"}, TypeError, "num_heads must be an integer, not str"),
        ({"num_heads": 3}, ValueError, "num_heads must be a multiple of the cache's kv_heads, 2, not 3"),
        ({"kv_cache": CACHE[:, :, :0]}, ValueError, "num_heads must be a multiple of the cache's kv_heads, 0, not 4"),
        ({"rotary_style": "gpt"}, ValueError, r"rotary_style must be one of \('neox', 'gptj'\), not 'gpt'"),
        ({"rotary_table": None}, TypeError, r"rotary_table must be a torch\.Tensor, not NoneType"),
        ({"rotary_table": TABLE.half()}, TypeError, "rotary_table must be float32, not float16"),
        ({"rotary_table": TABLE[0]}, ValueError, "rotary_table must have 2 dimensions, not 1"),
        ({"rotary_table": torch.zeros(8, 66)}, ValueError, "even number of columns up to head_size, 64, not 66"),
        ({"rotary_table": torch.zeros(8, 31)}, ValueError, "even number of columns up to head_size, 64, not 31"),
        ({"rotary_table": TABLE, "query_scale": TABLE[0]}, ValueError, r"query_scale must have the shape \(8,\), not"),
        ({"rotary_offsets": INTS[:1].long()}, TypeError, "rotary_offsets must be int32, not int64"),
        ({"rotary_offsets": INTS}, ValueError, r"rotary_offsets must have the shape \(1,\), not \(2,\)"),
        ({"q_norm": WEIGHT}, ValueError, "q_norm and k_norm must both be given, or none of them"),
        ({"q_norm": WEIGHT, "k_norm": WEIGHT.float()}, TypeError, "k_norm must be float16, not float32"),
        ({"q_norm": WEIGHT[1:], "k_norm": WEIGHT}, ValueError, r"q_norm must have the shape \(64,\), not \(63,\)"),
        ({"cu_seqlens": [0, 2]}, TypeError, r"cu_seqlens must be a torch\.Tensor, not list"),
        ({"cu_seqlens": INTS.long()}, TypeError, "cu_seqlens must be int32, not int64"),
        ({"cu_seqlens": INTS.repeat(2)}, ValueError, "from 1 to 3 elements for a cache of 2 sequences, not 4"),
        ({"cu_seqlens": INTS[:1]}, ValueError, "qkv must have no rows without sequences, not 2"),
        ({"past_lengths": INTS}, ValueError, r"past_lengths must have the shape \(1,\), not \(2,\)"),
        ({"norm_eps": 0}, ValueError, "norm_eps must be a finite number above 0, not 0"),
        ({"norm_eps": "1e-6"}, TypeError, "norm_eps must be a number, not str"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be a finite number above 0, not 0.0"),
        ({"softmax_scale": -0.1}, ValueError, "softmax_scale must be a finite number above 0, not -0.1"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be a finite number above 0, not nan"),
        ({"softmax_scale": TABLE}, TypeError, "softmax_scale must be a number, not Tensor"),
        ({"out": QKV}, ValueError, r"out must have the shape \(2, 256\), not \(2, 512\)"),
        ({"out": QKV[:, :256].float()}, TypeError, "out must be float16, not float32"),
        ({}, ValueError, "qkv must be on an NVIDIA GPU, not on cpu"),
    ],
)
def test_refused_arguments_of_prefill_attention(changed, error, message):
    with pytest.raises(error, match=message):
        attention.prefill_attention(**arguments(**changed))


def test_refused_arguments_of_decode_attention():
    inputs = arguments()["inputs"]
    workspace = attention.decode_attention_workspace(inputs)
    with pytest.raises(ValueError, match="qkv must have at most 2 rows for a cache of 2 sequences, not 4"):
        attention.decode_attention(QKV.repeat(2, 1), inputs, INTS.repeat(2), workspace)
    with pytest.raises(TypeError, match="past_lengths must be int32, not int64"):
        attention.decode_attention(QKV, inputs, INTS.long(), workspace)
    with pytest.raises(ValueError, match=r"rotary_offsets must have the shape \(2,\)"):
        attention.decode_attention(QKV, replace(inputs, rotary_offsets=INTS[:1]), INTS, workspace)
    with pytest.raises(ValueError, match="softmax_scale must be a finite number above 0, not inf"):
        attention.decode_attention(QKV, inputs, INTS, workspace, softmax_scale=float("inf"))
    with pytest.raises(ValueError, match="qkv must be on an NVIDIA GPU, not on cpu"):
        attention.decode_attention(QKV, inputs, INTS, workspace)


@pytest.mark.gpu
def test_workspace_of_another_cache_is_refused():
    case = make_case((4, 2), 64, torch.float16, [3] * 4, [1] * 4, 8, {})
    inputs = inputs_of(case)
    small = replace(inputs, kv_cache=case.cache[:2], rotary_offsets=None)
    past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=r"workspace must be that of .* bytes and 16 semaphores, not \d+ and 8"):
        attention.decode_attention(case.qkv, inputs, past, attention.decode_attention_workspace(small))
