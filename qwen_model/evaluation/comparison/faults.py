"""Compute embedding, norms and linear layers with the faults that implementations of decoders have had.

A fault is a text that completes "it computes as if ...", and the result that it gives, in float64. The functions are
generators: a result is computed when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import permutations

import numpy as np

from ...interface.probe import Array
from .attention_faults import context_faults, heads_faults
from .case import Case
from .formulas import rms_norm, silu

Fault = tuple[str, Array]

OTHER_WEIGHTS = "its weights were right, and they are not those of the reference"
"""The fault of an operation that is right for the weights that are read."""
EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3)


def faults(case: Case) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield the faults that the operation of this result can have, likely ones first, each with what it gives.

    That is the result by its name; a fault of q, k or v gives those of the other two as well.
    """
    if case.kind in ("attention.q", "attention.k", "attention.v"):
        yield from heads_faults(case)
        return
    for text, result in _faults_of_one_result(case):
        yield text, {case.name: result}


def _faults_of_one_result(case: Case) -> Iterator[Fault]:
    if case.kind == "embedding":
        return _embedding_faults(case)
    if case.kind.endswith(".residual"):
        return _sum_faults(case)
    if case.kind.endswith("norm"):
        return _norm_faults(case)
    return context_faults(case) if case.kind == "attention" else _linear_faults(case)


def _embedding_faults(case: Case) -> Iterator[Fault]:
    table, _ = case.module("embedding")
    ids = np.asarray(case.tokens)
    yield OTHER_WEIGHTS, table[ids]
    yield "its rows were multiplied by the square root of the hidden size", table[ids] * math.sqrt(table.shape[1])
    for shift in (1, -1):
        yield f"{shift:+d} were added to token ids", table[(ids + shift) % len(table)]
    if not case.config.tied_embedding:
        yield "its table were that of lm_head", case.module("lm_head")[0][ids]


def _sum_faults(case: Case) -> Iterator[Fault]:
    x, residual = case.norm_inputs
    yield "the residual were not added", x
    if residual is not None:
        yield "the residual were not added to", residual
        yield "the residual were added twice", x + 2 * residual


def _norm_faults(case: Case) -> Iterator[Fault]:
    x, residual = case.norm_inputs
    h = x if residual is None else x + residual
    weight, eps = case.module(case.name)[0], case.config.norm_eps
    yield OTHER_WEIGHTS, rms_norm(h, weight, eps)
    yield from ((f"eps were {other:g}, not {eps:g}", rms_norm(h, weight, other)) for other in EPSILONS if other != eps)
    if residual is not None:
        yield "the residual were not added", rms_norm(x, weight, eps)
        yield "the residual were not added to", rms_norm(residual, weight, eps)
    yield "the weight were not applied", rms_norm(h, np.ones_like(weight), eps)
    yield "1 were added to the weight", rms_norm(h, weight + 1, eps)
    yield "it were a LayerNorm, which subtracts the mean", rms_norm(h - h.mean(-1, keepdims=True), weight, eps)
    yield "it only multiplied by the weight", h * weight
    yield "squares were summed, not averaged", rms_norm(h, weight / math.sqrt(h.shape[-1]), eps / h.shape[-1])
    for name in _other_norms(case):
        yield f"the weight were that of {name}", rms_norm(h, case.module(name)[0], eps)


def _other_norms(case: Case) -> Iterator[str]:
    last = case.config.num_layers - 1
    if case.layer is None:
        yield from (case.sibling(kind, last) for kind in ("input_norm", "post_attention_norm"))
        return
    yield case.sibling("post_attention_norm" if case.kind == "input_norm" else "input_norm")
    yield from case.neighbours()
    yield "final_norm"


def _linear_faults(case: Case) -> Iterator[Fault]:
    source, x = case.linear_input
    weight, bias = case.module(case.name)
    zero = np.zeros(len(weight))
    added = zero if bias is None else bias
    finish = _swiglu if case.kind == "mlp.gate_up" else np.asarray
    yield OTHER_WEIGHTS, finish(x @ weight.T + added)
    if case.kind == "attention.qkv":
        yield from _order_faults(case, x @ weight.T + added)
    if case.kind == "mlp.gate_up":
        yield from _swiglu_faults(x @ weight.T + added)
    if bias is not None:
        yield "the bias were missing", finish(x @ weight.T)
        yield "the bias were added twice", finish(x @ weight.T + 2 * bias)
    yield "the weight were transposed", finish(x @ _transposed(weight).T + added)
    for name, other in _other_inputs(case, source):
        yield f"it read {name}", finish(other @ weight.T + added)
    for name in ["embedding"] if case.kind == "lm_head" else case.neighbours():
        weight, bias = case.module(name)
        yield f"the weight were that of {name}", finish(x @ weight.T + (zero if bias is None else bias))


def _transposed(weight: Array) -> Array:
    """Read the memory of a weight [in, out] as if it were [out, in]."""
    return np.ascontiguousarray(weight.T).reshape(weight.shape)


def _other_inputs(case: Case, source: str) -> Iterator[tuple[str, Array]]:
    """Yield name and value of what a layer behind a norm could read instead."""
    if source.endswith("norm"):
        if f"{source}.residual" in case.values:
            yield f"the sum that {source} normalises", case.values[f"{source}.residual"]
        elif source == "layers.0.input_norm":
            yield "the embedding", case.values["embedding"]


def _order_faults(case: Case, y: Array) -> Iterator[Fault]:
    config = case.config
    kv = config.num_kv_heads * config.head_size
    q, k, v = np.split(y, [y.shape[1] - 2 * kv, y.shape[1] - kv], axis=1)
    parts = {"q": q, "k": k, "v": v}
    for order in permutations("qkv"):
        if order != ("q", "k", "v"):
            yield f"its rows were in the order {', '.join(order)}", np.concatenate([parts[name] for name in order], 1)
    heads = [part.reshape(len(y), config.num_kv_heads, -1) for part in (q, k, v)]
    yield "the rows of q, k and v alternated for each kv head", np.concatenate(heads, axis=2).reshape(y.shape)


def _swiglu(y: Array) -> Array:
    gate, up = np.split(y, 2, axis=-1)
    return silu(gate) * up


def _swiglu_faults(y: Array) -> Iterator[Fault]:
    gate, up = np.split(y, 2, axis=-1)
    yield "gate and up were swapped", silu(up) * gate
    yield "the rows of gate and up alternated", silu(y[:, ::2]) * y[:, 1::2]
    for name, activation in ACTIVATIONS.items():
        yield f"the activation were {name}, not silu", activation(gate) * up
    yield "up were missing", silu(gate)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": np.asarray,
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu with tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
