"""The functions of qwen_plugins.launch and .tuning that the TensorRT back end calls, in NumPy, on addresses."""

import struct
import types

import ml_dtypes
import numpy as np

from tests.stand_ins.numpy_cuda import enqueue, view

DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 7: np.dtype(ml_dtypes.bfloat16)}
NO_TOKEN = -1
SETTINGS = struct.Struct("<fffiQQ")  # temperature, top_p, repetition_penalty, top_k, seed, step


def settings_bytes(
    *, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seed: int, step: int
) -> bytes:
    return SETTINGS.pack(temperature, top_p, repetition_penalty, top_k, seed, step)


def sample(
    *,
    logits: int,
    logits_row_stride: int,
    sequences: int,
    vocab_size: int,
    dtype: int,
    settings: int,
    greedy: bool,
    seen: int,
    tokens: int,
    input_ids: int,
    past_lengths: int,
    workspace: int,
    semaphores: int,
    stream: int,
) -> None:
    assert logits_row_stride == vocab_size
    assert not (greedy and not settings)
    assert not view(semaphores, (sequences + 1,), np.dtype(np.int32)).any()

    def run() -> None:
        rows = view(logits, (sequences, vocab_size), DTYPES[dtype]).astype(np.float32)
        values = SETTINGS.unpack(view(settings, (SETTINGS.size,), np.dtype(np.uint8)).tobytes()) if settings else None
        bits = view(seen, (sequences, (vocab_size + 31) // 32), np.dtype(np.uint32)) if seen else None
        for i, row in enumerate(rows):
            if values is not None and bits is not None:
                known = np.unpackbits(bits[i].view(np.uint8), bitorder="little")[:vocab_size].astype(bool)
                row = np.where(known, np.where(row > 0, row / values[2], row * values[2]), row)
            if not np.isfinite(row.max()):  # NaN or +infinity somewhere, or -infinity everywhere
                token = NO_TOKEN
            else:
                token = int(row.argmax()) if greedy or values is None else draw(row, values, i)
            view(tokens, (sequences,), np.dtype(np.int32))[i] = token
            view(input_ids, (sequences,), np.dtype(np.int32))[i] = max(token, 0)
            if bits is not None and token != NO_TOKEN:
                bits[i, token // 32] |= np.uint32(1 << token % 32)
        if past_lengths:
            view(past_lengths, (sequences,), np.dtype(np.int32))[:] += 1
        if values is not None:
            view(settings + SETTINGS.size - 8, (1,), np.dtype(np.uint64))[0] += 1

    enqueue(run, stream)


def draw(row: np.ndarray, values: tuple, index: int) -> int:
    temperature, top_p, _, top_k, seed, step = values
    order = np.argsort(-row, kind="stable")[: top_k or None]
    probabilities = np.exp((row[order] - row[order[0]]) / temperature)
    probabilities /= probabilities.sum()
    kept = np.cumsum(probabilities) - probabilities < top_p
    probabilities = probabilities[kept] / probabilities[kept].sum()
    return int(np.random.default_rng([seed, step, index]).choice(order[kept], p=probabilities))


def gather_rows(
    *, table: int, ids: int, y: int, table_rows: int, row_size: int, rows: int, dtype: int, stream: int
) -> None:
    kind = np.dtype(f"V{DTYPES[dtype].itemsize}")

    def run() -> None:
        found = view(ids, (rows,), np.dtype(np.int32))
        assert found.min() >= 0
        assert found.max() < table_rows
        view(y, (rows, row_size), kind)[:] = view(table, (table_rows, row_size), kind)[found]

    enqueue(run, stream)


GEMM_KERNELS = {"rules": 0, "stream": 0x10000, "cublas_lt:2": 0x40002}


def gemm_choice_number(name: str) -> int:
    if name not in GEMM_KERNELS:
        raise ValueError(f"kernels: this build of qwen_plugins has no GEMM kernel '{name}'")
    return GEMM_KERNELS[name]


def measure(*, rows: int, **shape: object) -> dict[str, float]:
    return {"stream": 1.0 + rows, "cublas_lt:2": 16.0}


core = types.ModuleType("qwen_plugins._core")
core.__dict__.update(
    DataType=types.SimpleNamespace(**{dtype.name: number for number, dtype in DTYPES.items()}),
    cublas_lt_status=lambda: "NumPy in its place",
    sample=sample,
    gather_rows=gather_rows,
    environment=lambda: {"gpu": "NumPy", "kernels": 1},
    candidates=lambda **shape: ["stream", "cublas_lt:2"],
    measure=measure,
    sampling_settings_bytes=settings_bytes,
    gemm_choice_number=gemm_choice_number,
    sampling_workspace_bytes=lambda max_sequences, vocab_size: 16,
)
