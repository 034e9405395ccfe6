"""The functions of qwen_plugins.launch and .tuning that the TensorRT back end calls, in NumPy, on addresses."""

import types
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qwen_plugins.sampling_starts import BIAS, SETTINGS, START, counts_row_size
from tests.stand_ins.numpy_cuda import enqueue, view

DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 7: np.dtype(ml_dtypes.bfloat16)}
NO_TOKEN = -1
MAX_BIASES = 512
IN_PROMPT = 1 << 15


@dataclass(kw_only=True)
class SamplingSlots:
    vocab_size: int
    settings: int
    biases: int
    marks: int
    mask_rows: int
    masks: int
    last_tokens: int
    workspace: int
    semaphores: int

    def settings_of(self, slot: int) -> np.ndarray:
        return view(self.settings + slot * SETTINGS.itemsize, (1,), SETTINGS)

    def biases_of(self, slot: int, count: int) -> np.ndarray:
        return view(self.biases + slot * MAX_BIASES * BIAS.itemsize, (count,), BIAS)

    def mask_of(self, slot: int) -> np.ndarray | None:
        (row,) = view(self.mask_rows + 4 * slot, (1,), np.dtype(np.int32))
        words = (self.vocab_size + 31) // 32
        return None if row < 0 else view(self.masks + 4 * words * int(row), (words,), np.dtype(np.uint32))


def start_sampling(
    memory: SamplingSlots, *, starts: int, biases: int, tokens: int, sequences: int, stream: int
) -> None:
    def run() -> None:
        for record in view(starts, (sequences,), START):
            settings, slot = record["settings"], int(record["slot"])
            memory.settings_of(slot)[0] = settings
            count = int(settings["num_biases"])
            memory.biases_of(slot, count)[:] = view(biases + 8 * int(record["first_bias"]), (count,), BIAS)
            if not settings["counts"]:
                continue
            counts = view(int(settings["counts"]), (counts_row_size(memory.vocab_size),), np.dtype(np.uint16))
            counts[:] = 0
            prompt, output = int(record["prompt_length"]), int(record["output_length"])
            known = view(tokens + 4 * int(record["first_token"]), (prompt + output,), np.dtype(np.int32))
            np.add.at(counts, known[prompt:], 1)
            counts[known[:prompt]] |= IN_PROMPT

    enqueue(run, stream)


def sample(
    memory: SamplingSlots,
    *,
    logits: int,
    logits_row_stride: int,
    sequences: int,
    dtype: int,
    slots: int,
    largest: bool,
    tokens: int,
    stream: int,
    past_lengths: int = 0,
) -> None:
    assert logits_row_stride == memory.vocab_size
    assert not view(memory.semaphores, (sequences,), np.dtype(np.int32)).any()

    def run() -> None:
        rows = view(logits, (sequences, memory.vocab_size), DTYPES[dtype]).astype(np.float32)
        of_rows = view(slots, (sequences,), np.dtype(np.int32)) if slots else np.arange(sequences)
        for i, (row, slot) in enumerate(zip(rows, of_rows.tolist(), strict=True)):
            token = first_largest(row) if largest else choose(memory, row, slot)
            view(tokens, (sequences,), np.dtype(np.int32))[i] = token
            view(memory.last_tokens + 4 * slot, (1,), np.dtype(np.int32))[0] = max(token, 0)
        if past_lengths:
            view(past_lengths, (sequences,), np.dtype(np.int32))[:] += 1

    enqueue(run, stream)


def first_largest(row: np.ndarray) -> int:
    """NO_TOKEN for NaN or +infinity somewhere, or -infinity everywhere."""
    return int(row.argmax()) if np.isfinite(row.max()) else NO_TOKEN


def choose(memory: SamplingSlots, row: np.ndarray, slot: int) -> int:
    (settings,) = memory.settings_of(slot)
    counts = None
    for bias in memory.biases_of(slot, int(settings["num_biases"])):
        row[bias["token"]] += bias["value"]
    if settings["counts"]:
        counts = view(int(settings["counts"]), row.shape, np.dtype(np.uint16))
        penalty, output = settings["repetition_penalty"], counts % IN_PROMPT
        row = np.where(counts > 0, np.where(row > 0, row / penalty, row * penalty), row)
        row = row - settings["frequency_penalty"] * output - settings["presence_penalty"] * (output > 0)
    mask = memory.mask_of(slot)
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(row)].astype(bool)
        row = np.where(allowed | ~(row < np.inf), row, -np.inf)
    token = first_largest(row)
    if token != NO_TOKEN and not settings["greedy"]:
        token = draw(row, settings)
    settings["step"] += 1
    if counts is not None and token != NO_TOKEN:
        counts[token] += 1
    return token


def draw(row: np.ndarray, settings: np.ndarray) -> int:
    order = np.argsort(-row, kind="stable")[: int(settings["top_k"]) or None]
    weights = np.exp((row[order] - row[order[0]]) / settings["temperature"])
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= settings["top_p"]] = 0
    weights[weights < settings["min_p"] * weights[0]] = 0
    seed = [int(settings[name]) for name in ("seed", "step", "draw_stream")]
    return int(np.random.default_rng(seed).choice(order, p=weights / weights.sum()))


def logprobs(
    *,
    logits: int,
    logits_row_stride: int,
    sequences: int,
    vocab_size: int,
    dtype: int,
    num_best: int,
    tokens: int,
    logprobs: int,
    best_tokens: int,
    best_logprobs: int,
    stream: int,
) -> None:
    assert logits_row_stride == vocab_size

    def run() -> None:
        rows = view(logits, (sequences, vocab_size), DTYPES[dtype]).astype(np.float32)
        chosen = view(tokens, (sequences,), np.dtype(np.int32))
        count = min(num_best, vocab_size)
        for i, row in enumerate(rows):
            own = view(logprobs + 4 * i, (1,), np.dtype(np.float32))
            ids = view(best_tokens + 4 * num_best * i, (num_best,), np.dtype(np.int32))
            best = view(best_logprobs + 4 * num_best * i, (num_best,), np.dtype(np.float32))
            own[:], ids[:], best[:] = np.nan, NO_TOKEN, -np.inf
            if not np.isfinite(row.max()):
                best[:] = np.nan
                continue
            values = row - row.max() - np.log(np.exp(row - row.max()).sum())
            if chosen[i] != NO_TOKEN:
                own[0] = values[chosen[i]]
            ids[:count] = np.argsort(-row, kind="stable")[:count]
            best[:count] = values[ids[:count]]

    enqueue(run, stream)


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
    CUDA_VERSION=13000,
    DataType=types.SimpleNamespace(**{dtype.name: number for number, dtype in DTYPES.items()}),
    cublas_lt_status=lambda: "NumPy in its place",
    MAX_BIASES=MAX_BIASES,
    SamplingSlots=SamplingSlots,
    sample=sample,
    start_sampling=start_sampling,
    logprobs=logprobs,
    gather_rows=gather_rows,
    environment=lambda: {"gpu": "NumPy", "kernels": 1},
    candidates=lambda **shape: ["stream", "cublas_lt:2"],
    measure=measure,
    gemm_choice_number=gemm_choice_number,
    sampling_workspace_bytes=lambda max_sequences, vocab_size: 16,
)
