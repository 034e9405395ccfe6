"""Compute heads and attention with the faults of `faults.py`: the rotary embedding, norms of heads, softmax, cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ...checkpoints.config import ModelConfig
from ...interface.probe import Array
from ...network.rotary import rotary_table
from .case import Case
from .formulas import attend, rms_norm, rotate

BASES = (1e4, 5e5, 1e6, 1e7, 1e5, 2e6, 5e6, 8e6)


@dataclass(frozen=True)
class Heads:
    """Say how q and k are made of the columns of qkv."""

    order: tuple[str, ...] = ("q", "k", "v")
    rotations: int = 1  # 0: none, 2: twice, -1: backwards
    interleaved: bool = False
    shift: int = 0  # added to positions
    restart: bool = False  # positions of a decode step begin at 0
    norm: str = "before"  # of each head, beside the rotary embedding: "before", "after", "none", "swapped" weights
    query_scale: bool = True  # Qwen v1's logn
    rotates_v: bool = False


@dataclass(frozen=True)
class Attention:
    """Say how attention is computed from the heads."""

    scale: float
    causal: bool = True
    sees_itself: bool = True
    strided_groups: bool = False
    cache: bool = True  # whether the tokens before this step are seen


def heads_faults(case: Case) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield the faults of q, k and v, each with what it makes of all three, by their names."""
    for text, config, how in _value_faults(case) if case.kind == "attention.v" else _heads_faults(case):
        heads = _heads(case, config, how)
        yield text, {case.sibling(f"attention.{name}"): x.reshape(len(x), -1) for name, x in heads.items()}


def context_faults(case: Case) -> Iterator[tuple[str, Array]]:
    """Yield the faults of attention's result, and those of the heads, which not every back end shows."""
    right = _heads(case, case.config, Heads())
    how = Attention(case.config.head_size**-0.5)
    for text, other in _softmax_faults(case.config, bool(case.past)):
        yield text, _context(case, right, other)
    for text, config, heads in _heads_faults(case):
        wrong = _heads(case, config, heads)
        yield f"{text} (for q alone)", _context(case, {**right, "q": wrong["q"]}, how)
        yield text, _context(case, wrong, how)


def _heads_faults(case: Case) -> Iterator[tuple[str, ModelConfig, Heads]]:
    config = case.config
    if case.past:
        yield "positions began at 0 in a decode step, which is the same as no rotation", config, Heads(restart=True)
    yield "the rotary embedding were not applied", config, Heads(rotations=0)
    yield "the rotary embedding were applied twice", config, Heads(rotations=2)
    yield "the rotary embedding were interleaved (GPT-J), not in the NeoX style", config, Heads(interleaved=True)
    yield "the rotary embedding turned backwards", config, Heads(rotations=-1)
    for shift in (1, -1):
        yield f"{shift:+d} were added to positions", config, Heads(shift=shift)
    yield from ((text, changed, Heads()) for text, changed in _other_rotary(config))
    yield from _order_faults(config)
    if config.qk_norm:
        yield "q and k were not normalised", config, Heads(norm="none")
        yield "q and k were normalised after the rotary embedding", config, Heads(norm="after")
        yield "the weights of q_norm and k_norm were swapped", config, Heads(norm="swapped")
    if config.logn_length:
        yield "q were not multiplied by logn's factors", config, Heads(query_scale=False)


def _value_faults(case: Case) -> Iterator[tuple[str, ModelConfig, Heads]]:
    yield "v were rotated, too", case.config, Heads(rotates_v=True)
    yield from _order_faults(case.config)


def _order_faults(config: ModelConfig) -> Iterator[tuple[str, ModelConfig, Heads]]:
    for order in permutations("qkv"):
        if order != ("q", "k", "v"):
            yield f"the columns of qkv were in the order {', '.join(order)}", config, Heads(order=order)


def _other_rotary(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yield configurations with another base, scaling or number of rotated elements."""
    rotary = config.rotary
    for base in BASES:
        if base != rotary.base:
            changed = dataclasses.replace(rotary, base=base)
            yield (
                f"the base of the rotary embedding were {base:g}, not {rotary.base:g}",
                dataclasses.replace(config, rotary=changed),
            )
    if rotary.scaling != "none":
        plain = dataclasses.replace(rotary, scaling="none", attention_factor=1.0)
        yield f"the rotary scaling {rotary.scaling!r} were missing", dataclasses.replace(config, rotary=plain)
    for dim in (config.head_size, config.head_size // 2, config.head_size // 4):
        if dim != rotary.dim and dim >= 4 and dim % 2 == 0:
            partial = dataclasses.replace(rotary, dim=dim)
            yield (
                f"{dim} elements of each head were rotated, not {rotary.dim}",
                dataclasses.replace(config, rotary=partial),
            )


def _softmax_faults(config: ModelConfig, decoding: bool) -> Iterator[tuple[str, Attention]]:
    right = Attention(config.head_size**-0.5)
    yield "the softmax were not scaled", dataclasses.replace(right, scale=1.0)
    yield "the softmax were scaled twice", dataclasses.replace(right, scale=1.0 / config.head_size)
    for name, size in (("hidden size", config.hidden_size), ("number of heads", config.num_heads)):
        yield f"the softmax were scaled by the {name}", dataclasses.replace(right, scale=size**-0.5)
    if 1 < config.num_kv_heads < config.num_heads:
        yield (
            "query head h read kv head h % kv_heads, not h // group: a wrong grouping of kv heads",
            dataclasses.replace(right, strided_groups=True),
        )
    if decoding:
        yield "the cache were not read", dataclasses.replace(right, cache=False)
    else:
        yield "tokens saw those after them", dataclasses.replace(right, causal=False)
    yield "a token did not see itself", dataclasses.replace(right, sees_itself=False)


def _heads(case: Case, config: ModelConfig, how: Heads) -> dict[str, Array]:
    """Return the heads of q, k and v, [tokens, heads, head_size] each."""
    qkv = case.values[case.sibling("attention.qkv")]
    sizes = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    starts = np.cumsum([sizes[name] * config.head_size for name in how.order])[:-1]
    columns = dict(zip(how.order, np.split(qkv, starts, axis=1), strict=True))
    heads = {name: part.reshape(len(qkv), -1, config.head_size) for name, part in columns.items()}
    table, query_scale = _rotary_rows(case, config, how)
    for name in ("q", "k"):
        x = heads[name]
        if how.norm in ("before", "swapped"):
            x = _normed(case, x, name, how)
        for _ in range(abs(how.rotations)):
            x = rotate(x, table, how.interleaved)
        heads[name] = _normed(case, x, name, how) if how.norm == "after" else x
    if how.rotates_v:
        heads["v"] = rotate(heads["v"], table)
    if query_scale is not None and how.query_scale:
        heads["q"] = heads["q"] * query_scale[:, None, None]
    return heads


def _normed(case: Case, x: Array, name: str, how: Heads) -> Array:
    if not case.config.qk_norm:
        return x
    if how.norm == "swapped":
        name = "k" if name == "q" else "q"
    return rms_norm(x, case.module(case.sibling(f"attention.{name}_norm"))[0], case.config.norm_eps)


def _rotary_rows(case: Case, config: ModelConfig, how: Heads) -> tuple[Array, Array | None]:
    """Return cosines and sines [tokens, dim] and the factors of q [tokens]."""
    count = len(case.tokens)
    table = rotary_table(config, case.past + count + 1)
    own = table.prompt_table([count], [0], [count]) if case.past == 0 else None
    start = 0 if own is not None else table.offset(case.prompt_length) + (0 if how.restart else case.past)
    rows = start + np.maximum(np.arange(count) + how.shift, -start)
    source = table if own is None else own
    rows = np.minimum(rows, len(source.values) - 1)
    values = source.values[rows].astype(np.float64)
    if how.rotations < 0:
        values[:, values.shape[1] // 2 :] *= -1
    return values, None if source.query_scale is None else source.query_scale[rows].astype(np.float64)


def _context(case: Case, heads: dict[str, Array], how: Attention) -> Array:
    """Return attention's result, [tokens, heads · head_size]."""
    size, count = case.config.head_size, len(case.tokens)
    past = case.past if how.cache else 0
    k, v = (
        np.concatenate([*_cached(case, name)[:past], heads[name].reshape(count, -1)]).reshape(past + count, -1, size)
        for name in ("k", "v")
    )
    ages = past + np.arange(count)[:, None] - np.arange(past + count)
    visible = (ages >= (0 if how.sees_itself else 1)) if how.causal else np.ones_like(ages, dtype=bool)
    return attend(heads["q"], k, v, how.scale, visible, how.strided_groups)


def _cached(case: Case, name: str) -> list[Array]:
    """Return the keys or values of the tokens before this step, a row of [1, kv_heads · head_size] for each."""
    steps = [values[case.sibling(f"attention.{name}")] for values in case.past_values]
    return [row[None] for step in steps for row in step]
