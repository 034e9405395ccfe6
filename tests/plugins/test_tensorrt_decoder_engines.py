"""Engines with Gemm and GptAttention on a real TensorRT and a GPU, against float64.

pytest tests/plugins -m tensorrt

Needs tensorrt, cuda-bindings and NumPy; no torch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

import qwen_plugins.tensorrt as plugins  # noqa: E402
from qwen_model.backends.tensorrt.cuda_runtime import DeviceMemory  # noqa: E402
from support.tensorrt_engines import LOG, Engine, Execution, Graph, Input, build_plan, check, cudart  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

TYPES = {"float32": trt.float32, "float16": trt.float16}
TOLERANCE = {"float32": 3e-5, "float16": 4e-3}
EPS = 1e-5


def normal(*shape: int, dtype: str = "float16", scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng().standard_normal(shape, np.float32) * scale).astype(dtype)


def assert_close(actual: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


# Gemm


def gemm_input(dtype: str, in_features: int, max_rows: int, min_rows: int = 1) -> Input:
    return Input(TYPES[dtype], (-1, in_features), (min_rows,), (8,), (max_rows,))


def swiglu(z: np.ndarray) -> np.ndarray:
    gate, up = np.split(z, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 96), (256, 512), (4096, 1024), (1000, 300), (11008, 256), (127, 130)]
)
def test_gemm(dtype: str, in_features: int, out_features: int) -> None:
    weight = normal(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    bias = normal(out_features, dtype=dtype)

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        x = tensors["x"]
        return {
            "plain": plugins.gemm(network, x, weight),
            "bias": plugins.gemm(network, x, weight, bias),
            "swiglu": plugins.gemm(network, x, weight, bias, activation="swiglu"),
        }

    engine = Engine(build_plan({"x": gemm_input(dtype, in_features, 512)}, describe))
    for num_rows in (1, 2, 3, 4, 7, 8, 16, 17, 40, 129, 512):
        x = normal(num_rows, in_features, dtype=dtype)
        results = engine.run({"x": x})
        z = x.astype(np.float64) @ weight.astype(np.float64).T
        assert_close(results["plain"], z, dtype)
        assert_close(results["bias"], z + bias, dtype)
        assert_close(results["swiglu"], swiglu(z + bias), dtype)


def test_gemm_of_no_rows_and_of_more_dimensions() -> None:
    weight = normal(96, 64, scale=0.125)
    inputs = {"x": gemm_input("float16", 64, 16, min_rows=0), "x4": Input(trt.float16, (2, 3, 1, 64))}
    engine = Engine(
        build_plan(
            inputs, lambda network, tensors: {"y_" + n: plugins.gemm(network, t, weight) for n, t in tensors.items()}
        )
    )
    x4 = normal(2, 3, 1, 64)
    results = engine.run({"x": normal(0, 64), "x4": x4})

    assert results["y_x"].shape == (0, 96)
    assert_close(results["y_x4"], x4.astype(np.float64) @ weight.astype(np.float64).T, "float16")


def test_gemm_with_its_weight_as_an_input() -> None:
    inputs = {
        "x": gemm_input("float16", 256, 64),
        "weight": Input(trt.float16, (128, 256)),
        "bias": Input(trt.float16, (128,)),
    }
    engine = Engine(build_plan(inputs, lambda network, tensors: {"y": plugins.gemm(network, *tensors.values())}))
    arrays = {"x": normal(9, 256), "weight": normal(128, 256, scale=1 / 16), "bias": normal(128)}
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}

    assert_close(engine.run(arrays)["y"], wide["x"] @ wide["weight"].T + wide["bias"], "float16")


def test_a_chain_of_a_decoder_is_nothing_but_kernels() -> None:
    """Four MLP blocks: no reformatting between the layers, and the same results with and without a CUDA graph."""
    norm, hidden, intermediate = normal(256, scale=0.1) + np.float16(1), 256, 512
    gate_up, down = normal(2 * intermediate, hidden, scale=1 / 16), normal(hidden, intermediate, scale=1 / 32)

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        x, h = tensors["x"], tensors["h"]
        for _ in range(4):
            x, h = plugins.rms_norm(network, x, norm, residual=h, dtype=trt.float16)
            x = plugins.gemm(network, x, gate_up, activation="swiglu", dtype=trt.float16)
            x = plugins.gemm(network, x, down, dtype=trt.float16)
        return {"x_out": x, "h_out": h}

    rows = gemm_input("float16", hidden, 64)
    execution = Engine(build_plan({"x": rows, "h": rows}, describe)).bind(
        {"x": normal(4, hidden), "h": normal(4, hidden)}
    )
    expected = execution.run()
    graph = Graph(execution.stream, execution.enqueue)
    assert set(graph.node_types()) == {"Kernel"}
    for output in execution.outputs.values():
        output.poison()
    check(cudart.cudaDeviceSynchronize())
    graph.launch()
    for name, array in execution.results().items():
        np.testing.assert_array_equal(array, expected[name])


CODES = {"int8": (np.dtype(np.int8), 127), "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448)}


def numbers_of(words: np.ndarray, kind: str) -> np.ndarray:
    """Return what codes that are int32 to TensorRT stand for."""
    return np.ascontiguousarray(words).view(CODES[kind][0]).astype(np.float64)


def assert_codes(words: np.ndarray, kind: str, exact: np.ndarray, scale: np.ndarray | float) -> None:
    """Check for the nearest codes, saturating; near the middle of two either passes."""
    _, largest = CODES[kind]
    steps = np.clip(exact / scale, -128 if kind == "int8" else -largest, largest)
    step = 1.0 if kind == "int8" else 2.0 ** (np.floor(np.log2(np.maximum(np.abs(steps), 2.0**-6))) - 3)
    assert np.all(np.abs(numbers_of(words, kind) - steps) <= 0.52 * step)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", CODES)
def test_a_chain_of_codes_is_nothing_but_kernels(kind: str, static: bool) -> None:
    """A norm, products and quantizations hand codes on; each result is that of the codes before it."""
    hidden, intermediate, rng = 256, 512, np.random.default_rng()
    norm = normal(hidden, scale=0.1) + np.float16(1)
    dtype, largest = CODES[kind]
    bias = normal(2 * intermediate)
    weights = [rng.uniform(-largest, largest, shape) for shape in ((2 * intermediate, hidden), (hidden, intermediate))]
    gate_up, down = (np.rint(each).astype(dtype) for each in weights)
    scales = [rng.uniform(0.5, 1.5, len(each)).astype(np.float32) / largest / 16 for each in (gate_up, down)]
    x_scale, y_scale = (4 / largest, 3 / largest) if static else (None, None)

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        half, layer = trt.float16, plugins.scaled_gemm
        found = plugins.rms_norm_quant(
            network, tensors["x"], norm, EPS, quant_dtype=kind, scale=x_scale, residual=tensors["h"], dtype=half
        )
        q, h, q_scales = (*found, x_scale) if static else (found[0], found[2], found[1])
        y = layer(network, q, gate_up, q_scales, scales[0], bias, dtype=half, activation="swiglu")
        if static:
            codes, y_scales = plugins.quantize(network, y, kind, y_scale, dtype=half), y_scale
            written = layer(
                network, q, gate_up, q_scales, scales[0], bias, dtype=half, activation="swiglu", y_scale=y_scale
            )
            more = {"written": written}
        else:
            codes, y_scales = plugins.quantize(network, y, kind, dtype=half)
            more = {"q_scales": q_scales, "y_scales": y_scales}
        z = layer(network, codes, down, y_scales, scales[1], dtype=half)
        return {"q": q, "h_out": h, "y": y, "codes": codes, "z": z, **more}

    rows = gemm_input("float16", hidden, 512)
    engine = Engine(build_plan({"x": rows, "h": rows}, describe))
    for count in (1, 7, 64, 300):
        arrays = {"x": normal(count, hidden), "h": normal(count, hidden)}
        execution = engine.bind(arrays)
        found = execution.run()
        h = found["h_out"].astype(np.float64)
        np.testing.assert_array_equal(found["h_out"], arrays["x"] + arrays["h"])
        y = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + EPS) * norm.astype(np.float64)
        q_scales = x_scale if static else found["q_scales"]
        assert_codes(found["q"], kind, y, q_scales)
        products = numbers_of(found["q"], kind) * q_scales @ (gate_up.astype(np.float64) * scales[0][:, None]).T
        exact = swiglu(products + bias)
        assert_close(found["y"], exact, "float16")
        y_scales = y_scale if static else found["y_scales"]
        assert_codes(found["codes"], kind, found["y"].astype(np.float64), y_scales)
        if static:
            same = numbers_of(found["written"], kind) - numbers_of(found["codes"], kind)
            assert np.mean(same != 0) < 0.05  # the one is quantized before it is rounded to float16
        else:
            np.testing.assert_allclose(q_scales, np.abs(y).max(-1, keepdims=True) / largest, rtol=1e-5)
            largest_y = np.abs(found["y"].astype(np.float64)).max(-1, keepdims=True)
            np.testing.assert_allclose(y_scales, largest_y / largest, rtol=1e-6)
        exact = numbers_of(found["codes"], kind) * y_scales @ (down.astype(np.float64) * scales[1][:, None]).T
        assert_close(found["z"], exact, "float16")
    graph = Graph(execution.stream, execution.enqueue)
    assert set(graph.node_types()) == {"Kernel"}


# GptAttention

MAX_BATCH, MAX_POSITIONS, ROWS = 4, 96, 200


@dataclasses.dataclass(frozen=True)
class Heads:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    rotary_dim: int = 64
    style: str = "rope_gpt_neox"
    qk_norm: bool = False
    query_scale: bool = False
    q_scaling: float = 1.0
    dtype: str = "float16"

    @property
    def packed(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size


class Attention:
    """An engine of one GptAttention layer, and the same computed in float64."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        rng = np.random.default_rng()
        angles = rng.uniform(0, 2 * np.pi, (ROWS, heads.rotary_dim // 2))
        self.table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        self.query_scale = rng.uniform(0.5, 1.5, ROWS).astype(np.float32) if heads.query_scale else None
        self.norms = [normal(heads.head_size, dtype=heads.dtype, scale=0.2) + np.ones((), heads.dtype) for _ in "qk"]
        self.plan = build_plan(self._inputs(), self._describe)

    def _inputs(self) -> dict[str, Input]:
        heads, sequences = self.heads, ((1,), (2,), (MAX_BATCH,))
        dtype = TYPES[heads.dtype]
        return {
            "qkv": Input(dtype, (-1, heads.packed), (1,), (8,), (256,)),
            "past": Input(dtype, (MAX_BATCH, 2, heads.num_kv_heads, MAX_POSITIONS, heads.head_size)),
            "cu_seqlens": Input(trt.int32, (-1,), (2,), (3,), (MAX_BATCH + 1,)),
            "past_lengths": Input(trt.int32, (-1,), *sequences),
            "rotary_offsets": Input(trt.int32, (-1,), *sequences),
            "semaphores": Input(trt.int32, (MAX_BATCH, heads.num_heads)),
        }

    def _describe(self, network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        heads = self.heads
        norms = dict(zip(("q_norm_weight", "k_norm_weight"), self.norms, strict=True)) if heads.qk_norm else {}
        names = ("qkv", "past", "cu_seqlens", "past_lengths", "rotary_offsets")
        context, present = plugins.gpt_attention(
            network,
            *(tensors[name] for name in names),
            *(self.table if heads.rotary_dim else None, tensors["semaphores"]),
            **{"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads, "head_size": heads.head_size},
            rotary_embedding_dim=heads.rotary_dim,
            position_embedding_type=heads.style,
            query_scale=self.query_scale,
            q_scaling=heads.q_scaling,
            norm_eps=1e-5,
            **norms,
            **self._pages(tensors),
        )
        return {"context": context, "present": present}

    def _pages(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {}

    def exact(self, qkv: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return context, keys and values [heads, tokens, head_size] of a whole sequence."""
        heads, (query, kv) = self.heads, (self.heads.num_heads, self.heads.num_kv_heads)
        split = qkv.astype(np.float64).reshape(len(qkv), query + 2 * kv, heads.head_size).transpose(1, 0, 2)
        q, k, v = split[:query], split[query : query + kv], split[query + kv :]
        rows = offset + np.arange(len(qkv))
        if heads.qk_norm:
            q, k = (self._normalised(x, weight) for x, weight in zip((q, k), self.norms, strict=True))
        q, k = self._rotated(q, rows), self._rotated(k, rows)
        if self.query_scale is not None:
            q = q * self.query_scale[rows, None]
        q, k = self._rounded(q), self._rounded(k)
        k, v = self._cached(k), self._cached(v)
        scores = q @ np.repeat(k, query // kv, axis=0).transpose(0, 2, 1) / (heads.q_scaling * heads.head_size**0.5)
        scores = np.where(np.tri(len(qkv), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(v, query // kv, axis=0)
        return context.transpose(1, 0, 2).reshape(len(qkv), -1), k, v

    def _cached(self, x: np.ndarray) -> np.ndarray:
        """Return what a cache keeps of keys or values."""
        return x

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.heads.dtype).astype(np.float64)

    def _normalised(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self._rounded(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight.astype(np.float64))

    def _rotated(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        dim = self.heads.rotary_dim
        if dim == 0:
            return x
        cos, sin = np.split(self.table[rows].astype(np.float64), 2, axis=1)
        first = slice(0, dim // 2) if self.heads.style == "rope_gpt_neox" else slice(0, dim, 2)
        second = slice(dim // 2, dim) if self.heads.style == "rope_gpt_neox" else slice(1, dim, 2)
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y


class Conversation:
    """Sequences that grow step by step, on the GPU and in float64."""

    def __init__(self, attention: Attention, in_place: bool, offsets: Sequence[int]) -> None:
        self.attention, self.in_place = attention, in_place
        self.engine = Engine(attention.plan)
        heads = attention.heads
        self.cache = normal(MAX_BATCH, 2, heads.num_kv_heads, MAX_POSITIONS, heads.head_size, dtype=heads.dtype)
        self.offsets = np.array(offsets, np.int32)
        self.histories = [np.empty((0, heads.packed), heads.dtype) for _ in offsets]

    def step(self, lengths: Sequence[int]) -> None:
        """Append tokens to every sequence and check the results."""
        past_lengths = np.array([len(history) for history in self.histories], np.int32)
        execution = self.bind(lengths, past_lengths)
        results = execution.run()
        assert not execution.inputs["semaphores"].download().any()
        before, self.cache = self.cache, results["present"]
        if not self.in_place:
            np.testing.assert_array_equal(execution.inputs["past"].download(), before)
        self.assert_right(results["context"], before, past_lengths)

    def bind(self, lengths: Sequence[int], past_lengths: np.ndarray) -> Execution:
        """Run random new tokens in an execution context with these shapes."""
        heads = self.attention.heads
        new = [normal(length, heads.packed, dtype=heads.dtype) for length in lengths]
        self.histories = [np.concatenate(pair) for pair in zip(self.histories, new, strict=True)]
        execution = self.engine.bind(
            {
                "qkv": np.concatenate(new),
                "past": self.cache,
                "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                "past_lengths": past_lengths,
                "rotary_offsets": self.offsets,
                "semaphores": np.zeros((MAX_BATCH, heads.num_heads), np.int32),
                **self.more_inputs(),
            }
        )
        if self.in_place:
            past = execution.inputs["past"]
            execution.context.set_tensor_address("present", past.address)
            execution.outputs = {"context": execution.outputs["context"]}
            run = execution.run
            execution.run = lambda: run() | {"present": past.download()}
        return execution

    def more_inputs(self) -> dict[str, np.ndarray]:
        return {}

    def assert_right(self, context: np.ndarray, before: np.ndarray, past_lengths: np.ndarray) -> None:
        """Check the new tokens' context, the cache up to them, and that nothing else was written."""
        dtype = self.attention.heads.dtype
        untouched = np.ones(self.cache.shape, bool)
        start = 0
        for row, (history, past) in enumerate(zip(self.histories, past_lengths, strict=True)):
            exact, keys, values = self.attention.exact(history, int(self.offsets[row]))
            count = len(history) - past
            assert_close(context[start : start + count], exact[past:], dtype)
            assert_close(self.cache[row, :, :, : len(history)], np.stack([keys, values]), dtype)
            untouched[row, :, :, past : len(history)] = False
            start += count
        np.testing.assert_array_equal(self.cache[untouched], before[untouched])


PAGE_SIZE, NUM_PAGES, MAX_PAGES = 64, 23, 5


class PagedAttention(Attention):
    """The same with version 2: a pool of pages, as many as a run has, in the type of qkv or in 8 bits."""

    def __init__(self, heads: Heads, kv_cache_dtype: str, context_dtype: str = "auto") -> None:
        self.kv_cache_dtype, self.context_dtype = kv_cache_dtype, context_dtype
        self.context_scale = None if context_dtype == "auto" else 5 / CODES[context_dtype][1]
        super().__init__(heads)

    def _inputs(self) -> dict[str, Input]:
        heads, sequences = self.heads, ((1,), (2,), (MAX_BATCH,))
        shape = (-1, 2, heads.num_kv_heads, PAGE_SIZE, heads.head_size)
        dtype = TYPES[heads.dtype]
        if self.kv_cache_dtype != "auto":
            shape, dtype = (-1, 2 * heads.num_kv_heads * PAGE_SIZE * (heads.head_size // 4 + 1)), trt.int32
        pages = {"pages": Input(trt.int32, (-1, MAX_PAGES), *sequences)}
        return super()._inputs() | {"past": Input(dtype, shape, (1,), (2,), (1000,))} | pages

    def _pages(self, tensors: dict[str, Any]) -> dict[str, Any]:
        context = {"context_dtype": self.context_dtype, "context_scale": self.context_scale}
        return {"pages": tensors["pages"], "kv_cache_dtype": self.kv_cache_dtype, **context}

    def _cached(self, x: np.ndarray) -> np.ndarray:
        if self.kv_cache_dtype == "auto":
            return x
        dtype, largest = CODES[self.kv_cache_dtype]
        scales = (np.abs(x).max(axis=-1, keepdims=True) / largest).astype(np.float32)
        codes = x / np.where(scales == 0, 1, scales)
        return (np.rint(codes) if dtype == np.int8 else codes.astype(dtype)).astype(np.float64) * scales

    def new_pool(self) -> np.ndarray:
        """Return pages as other sequences left them: NaN."""
        heads = self.heads
        if self.kv_cache_dtype == "auto":
            return np.full((NUM_PAGES, 2, heads.num_kv_heads, PAGE_SIZE, heads.head_size), np.nan, heads.dtype)
        words = 2 * heads.num_kv_heads * PAGE_SIZE * (heads.head_size // 4 + 1)
        return np.full((NUM_PAGES, words), -1, np.int32)

    def elements(self, pool: np.ndarray) -> np.ndarray:
        """Return float64 [num_pages, 2, kv_heads, PAGE_SIZE, head_size]."""
        if self.kv_cache_dtype == "auto":
            return pool.astype(np.float64)
        heads, (dtype, _) = self.heads, CODES[self.kv_cache_dtype]
        blocks = pool.view(np.uint8).reshape(NUM_PAGES, 2, heads.num_kv_heads, -1)
        count = PAGE_SIZE * heads.head_size
        codes = np.ascontiguousarray(blocks[..., :count]).view(dtype).astype(np.float64)
        scales = np.ascontiguousarray(blocks[..., count:]).view(np.float32).astype(np.float64)
        return codes.reshape(*blocks.shape[:3], PAGE_SIZE, heads.head_size) * scales[..., None]


class PagedConversation(Conversation):
    """Sequences that grow in pages which lie anywhere in the pool."""

    def __init__(self, attention: PagedAttention, offsets: Sequence[int]) -> None:
        super().__init__(attention, True, offsets)
        self.pool = attention
        self.cache = attention.new_pool()
        free = np.random.default_rng().permutation(np.arange(1, NUM_PAGES))
        self.pages = free[: len(offsets) * MAX_PAGES].reshape(len(offsets), MAX_PAGES).astype(np.int32)

    def more_inputs(self) -> dict[str, np.ndarray]:
        return {"pages": self.pages}

    def assert_right(self, context: np.ndarray, before: np.ndarray, past_lengths: np.ndarray) -> None:
        found, untouched = self.pool.elements(self.cache), np.ones((NUM_PAGES, PAGE_SIZE), bool)
        if self.pool.context_scale is not None:
            context = numbers_of(context, self.pool.context_dtype) * self.pool.context_scale
        start = 0
        for row, (history, past) in enumerate(zip(self.histories, past_lengths, strict=True)):
            exact, keys, values = self.pool.exact(history, int(self.offsets[row]))
            count = len(history) - past
            self.assert_near(context[start : start + count], exact[past:], 0.08, self.pool.context_dtype)
            positions = np.arange(len(history))
            pages, places = self.pages[row][positions // PAGE_SIZE], positions % PAGE_SIZE
            cached = found[pages, :, :, places].transpose(1, 2, 0, 3)  # [2, kv_heads, tokens, head_size]
            self.assert_near(cached, np.stack([keys, values]), 0.08, "auto")
            untouched[pages[past:], places[past:]] = False
            start += count
        same = self.pool.elements(before)
        np.testing.assert_array_equal(found.swapaxes(1, 3)[untouched], same.swapaxes(1, 3)[untouched])

    def assert_near(self, actual: np.ndarray, exact: np.ndarray, tolerance_of_codes: float, codes: str) -> None:
        """With 8 bits an element may become either of two codes, if it is beside the middle of them.

        codes: of `actual`, which is quantized itself; "auto": only the cache may be.
        """
        if self.pool.kv_cache_dtype == codes == "auto":
            assert_close(actual, exact, self.pool.heads.dtype)
            return
        difference, largest = np.abs(actual.astype(np.float64) - exact), np.abs(exact).max()
        mean = tolerance_of_codes / 50 * largest
        if codes != "auto":
            mean += self.pool.context_scale / 2 if codes == "int8" else np.abs(exact).mean() / 32
        assert difference.max() < tolerance_of_codes * largest
        assert difference.mean() < mean


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(),
        Heads(num_heads=28, num_kv_heads=4, head_size=128, rotary_dim=128),
        Heads(num_heads=8, num_kv_heads=1, head_size=80, rotary_dim=32, qk_norm=True, query_scale=True),
        Heads(dtype="float32", head_size=32, rotary_dim=16),
    ],
    ids=str,
)
def test_pages(heads: Heads, kv_cache_dtype: str) -> None:
    """Chunks of prompts, tokens, and both in one step, in pages that were never written or that others left."""
    conversation = PagedConversation(PagedAttention(heads, kv_cache_dtype), offsets=(0, 3, 7))
    for lengths in ((5, 1, 63), (1, 1, 1), (1, 1, 1), (70, 1, 30), (1, 90, 1), (1, 1, 1)):
        conversation.step(lengths)


@pytest.mark.parametrize("context_dtype", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("heads", "kv_cache_dtype"),
    [
        (Heads(num_heads=28, num_kv_heads=4, head_size=128, rotary_dim=128), "auto"),
        (Heads(head_size=80, rotary_dim=32, qk_norm=True, query_scale=True), "int8"),
        (Heads(dtype="float32", head_size=32, rotary_dim=16), "auto"),
    ],
    ids=str,
)
def test_a_context_of_codes(heads: Heads, kv_cache_dtype: str, context_dtype: str) -> None:
    conversation = PagedConversation(PagedAttention(heads, kv_cache_dtype, context_dtype), offsets=(0, 3, 7))
    for lengths in ((5, 1, 63), (1, 1, 1), (70, 1, 30), (1, 1, 1)):
        conversation.step(lengths)


def test_a_graph_of_decode_with_padding() -> None:
    """A padded row has one token in page 0, which nobody reads."""
    attention = PagedAttention(Heads(head_size=128, rotary_dim=128), "int8")
    conversation = PagedConversation(attention, offsets=(0, 5, 7))
    conversation.step((5, 64, 33))
    conversation.histories.append(np.empty((0, attention.heads.packed), np.float16))
    conversation.offsets = np.append(conversation.offsets, np.int32(0))
    conversation.pages = np.concatenate([conversation.pages, np.zeros((1, MAX_PAGES), np.int32)])
    conversation.step((1, 1, 1, 1))
    past_lengths = np.array([len(history) for history in conversation.histories], np.int32)
    past_lengths[-1] = 0
    conversation.histories[-1] = conversation.histories[-1][:0]
    execution = conversation.bind((1, 1, 1, 1), past_lengths)
    execution.enqueue()  # TensorRT prepares a context in its first run
    graph = Graph(execution.stream, execution.enqueue)
    assert set(graph.node_types()) == {"Kernel"}
    graph.launch()
    context = execution.results()["context"]  # waits for the stream
    before, conversation.cache = conversation.cache, execution.inputs["past"].download()
    conversation.assert_right(context, before, past_lengths)


def test_a_present_with_memory_of_its_own_is_refused() -> None:
    conversation = PagedConversation(PagedAttention(Heads(), "auto"), offsets=(0,))
    execution = conversation.bind((3,), np.zeros(1, np.int32))
    other = DeviceMemory(execution.inputs["past"].num_bytes)
    execution.context.set_tensor_address("present", other.address)
    LOG.messages.clear()
    with pytest.raises(RuntimeError, match="TensorRT refused to run"):
        execution.enqueue()
    assert any("'present_key_value' has memory of its own; expected that of" in line for line in LOG.messages)


@pytest.mark.parametrize(
    "heads",
    [
        Heads(),
        Heads(num_heads=2, num_kv_heads=2, head_size=128, rotary_dim=128),
        Heads(num_heads=8, num_kv_heads=1, head_size=80, rotary_dim=32),
        Heads(num_heads=3, num_kv_heads=3, head_size=96, rotary_dim=48, style="rope_gptj"),
        Heads(head_size=128, rotary_dim=128, qk_norm=True),
        Heads(query_scale=True, q_scaling=2.0),
        Heads(rotary_dim=0, style="learned_absolute"),
        Heads(head_size=256, rotary_dim=64, qk_norm=True, query_scale=True, style="rope_gptj"),
        Heads(dtype="float32"),
        Heads(dtype="float32", head_size=32, rotary_dim=16, qk_norm=True, query_scale=True),
    ],
    ids=str,
)
def test_prompts_then_tokens(heads: Heads) -> None:
    attention = Attention(heads)
    for in_place in (True, False):
        conversation = Conversation(attention, in_place, offsets=(0, 100, 7))
        for lengths in ((5, 1, 33), (1, 1, 1), (1, 1, 1), (2, 1, 7), (1, 1, 1)):
            conversation.step(lengths)
        alone = Conversation(attention, in_place, offsets=(0,))
        for length in (1, 1, 90, 1, 1):
            alone.step((length,))


def test_a_graph_of_decode_serves_all_lengths() -> None:
    attention = Attention(Heads(head_size=128, rotary_dim=128))
    conversation = Conversation(attention, True, offsets=(0, 100, 7, 50))
    conversation.step((5, 1, 33, 20))
    past_lengths = np.array([len(history) for history in conversation.histories], np.int32)
    execution = conversation.bind((1, 1, 1, 1), past_lengths)
    conversation.histories = [history[:-1] for history in conversation.histories]
    execution.run()  # TensorRT prepares a context in its first run
    graph = Graph(execution.stream, execution.enqueue)
    assert set(graph.node_types()) == {"Kernel"}
    conversation.cache = execution.inputs["past"].download()
    for _ in range(3):
        past_lengths = np.array([len(history) for history in conversation.histories], np.int32)
        new = normal(4, attention.heads.packed)
        conversation.histories = [
            np.concatenate([history, row[None]]) for history, row in zip(conversation.histories, new, strict=True)
        ]
        execution.inputs["qkv"].upload(new)
        execution.inputs["past_lengths"].upload(past_lengths)
        execution.outputs["context"].poison()
        check(cudart.cudaDeviceSynchronize())
        graph.launch()
        context = execution.results()["context"]
        before, conversation.cache = conversation.cache, execution.inputs["past"].download()
        conversation.assert_right(context, before, past_lengths)


def test_more_sequences_than_the_cache_has_are_refused_with_the_reason_in_the_log() -> None:
    """Each of these shapes is within the profile, but together they do not fit."""
    attention = Attention(Heads())
    conversation = Conversation(attention, True, offsets=(0, 0, 0))
    execution = conversation.bind((1, 1, 1), np.zeros(3, np.int32))
    execution.context.set_input_shape("past_lengths", (2,))
    LOG.messages.clear()
    with pytest.raises(RuntimeError, match="TensorRT refused to run"):
        execution.enqueue()
    assert any("input 'past_lengths' has shape [2]; expected [sequences], here [3]" in line for line in LOG.messages)


def test_an_engine_that_was_never_serialised() -> None:
    """An engine of build_engine in 8.6 runs the plug-in objects of the network itself, with the same results."""
    if not hasattr(trt.Builder, "build_engine"):
        pytest.skip("this TensorRT has no build_engine")
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    shapes = {"cu_seqlens": (2,), "past_lengths": (1,), "rotary_offsets": (1,), "semaphores": (1, 1)}
    qkv = network.add_input("qkv", trt.float16, (1, 192))
    past = network.add_input("past", trt.float16, (1, 2, 1, 32, 64))
    cu_seqlens, past_lengths, offsets, semaphores = (network.add_input(n, trt.int32, s) for n, s in shapes.items())
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_size": 64}
    tensors = (qkv, past, cu_seqlens, past_lengths, offsets, None, semaphores)
    for tensor, name in zip(plugins.gpt_attention(network, *tensors, **heads), ("context", "present"), strict=True):
        tensor.name = name
        network.mark_output(tensor)
    config = builder.create_builder_config()
    config.set_tactic_sources(0)
    plugins.configure_builder(config, network)
    engine = Engine.__new__(Engine)
    engine.engine = builder.build_engine(network, config)
    arrays = {"qkv": normal(1, 192), "past": normal(1, 2, 1, 32, 64)}
    arrays |= {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    arrays["cu_seqlens"][1] = 1

    np.testing.assert_array_equal(engine.run(arrays)["context"], arrays["qkv"][:, 128:])  # it attends to itself alone
