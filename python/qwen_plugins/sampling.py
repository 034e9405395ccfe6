"""Choosing the next token of each sequence, for PyTorch tensors on an NVIDIA GPU.

`sample`, with `mark_seen` for the tokens of prompts. They launch on PyTorch's current stream, wait
for nothing, and can be captured in a CUDA graph: what a request asks for is in device memory (`SamplingState`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_plugins._arguments import (
    CurrentDevice,
    address,
    check,
    check_int32,
    check_matrix,
    core,
    float_type_number,
)
from qwen_plugins.embedding import gather_rows  # noqa: F401  its former home

NO_TOKEN = -1
"""The result of `sample` for logits that are not finite: kNoToken of csrc/kernels/sampling/sampling.h."""


@dataclass(frozen=True)
class SamplingState:
    """Holds what `sample` keeps on the device from launch to launch; `sampling_state` makes one."""

    max_sequences: int
    vocab_size: int
    settings: Tensor  # uint8: SamplingSettings of csrc/kernels/sampling/sampling.h
    seen: Tensor  # int32 [max_sequences, (vocab_size + 31) // 32]: bits of the tokens that the penalty holds for
    workspace: Tensor
    semaphores: Tensor

    def set(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """Begin a request, in the order of the stream: its settings, the number of its first draw, no token seen.

        temperature above 0; top_k: 0 is all; top_p in (0, 1]; seed and step from 0 to 2**64 - 1. Without waiting.
        """
        check(0 < temperature < float("inf"), f"temperature must be a number above 0, not {temperature}")
        check(0 <= top_k < 2**31, f"top_k must be at least 0, not {top_k}")
        check(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
        check(
            0 < repetition_penalty < float("inf"),
            f"repetition_penalty must be a number above 0, not {repetition_penalty}",
        )
        check(0 <= seed < 2**64 and 0 <= step < 2**64, f"seed and step must be in 64 bits, not {seed} and {step}")
        values = core().sampling_settings_bytes(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            step=step,
        )
        pinned = torch.frombuffer(bytearray(values), dtype=torch.uint8).pin_memory()
        self.settings.copy_(pinned, non_blocking=True)
        self.seen.zero_()


def sampling_state(max_sequences: int, vocab_size: int, device: torch.device | str) -> SamplingState:
    """Allocate a state for up to `max_sequences`, with the settings of `SamplingState.set()`, on an NVIDIA GPU."""
    check(0 < max_sequences < 2**20, f"max_sequences must be from 1 to {2**20 - 1}, not {max_sequences}")
    _check_vocab_size(vocab_size)
    target = torch.device(device)
    check(target.type == "cuda", f"device must be an NVIDIA GPU, not {target}")
    state = SamplingState(
        max_sequences,
        vocab_size,
        settings=torch.zeros(len(core().sampling_settings_bytes(**_DEFAULTS)), dtype=torch.uint8, device=target),
        seen=torch.zeros(max_sequences, (vocab_size + 31) // 32, dtype=torch.int32, device=target),
        workspace=torch.empty(
            core().sampling_workspace_bytes(max_sequences, vocab_size), dtype=torch.uint8, device=target
        ),
        semaphores=torch.zeros(max_sequences + 1, dtype=torch.int32, device=target),
    )
    state.set()
    return state


_DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0, "step": 0}


def sample(
    logits: Tensor,
    state: SamplingState,
    *,
    greedy: bool = False,
    penalty: bool = True,
    past_lengths: Tensor | None = None,
    input_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each sequence, int32 [sequences], from logits [sequences, vocab_size].

    In the order of transformers: the repetition penalty of the tokens seen, the temperature, the top_k most likely
    tokens, of those the most likely ones that together have probability top_p, a draw. It depends on the logits, the
    state's settings, the number of the draw and the place in the batch alone. Every draw adds 1 to the step in the
    settings.

    A sequence whose logits have NaN or +infinity, or are all -infinity, gets NO_TOKEN (-1). Single logits may be
    -infinity: they are never chosen.

    logits: float32, float16 or bfloat16; rows may be strided.
    greedy: the largest logit after the penalty, the first of equal ones.
    penalty: whether there is a repetition penalty; if so, the chosen tokens are seen from now on. A greedy choice
        without it needs no settings, and leaves them as they are.
    past_lengths: int32 [sequences], on the device: 1 is added to each.
    input_ids: int32 [sequences], on the device: gets the tokens, with 0 for NO_TOKEN. A step that is launched before
        anybody has looked at the tokens takes these.
    """
    check_matrix("logits", logits)
    sequences, vocab_size = logits.shape
    right = sequences <= state.max_sequences and vocab_size == state.vocab_size
    check(
        right and logits.device == state.settings.device,
        f"logits must be [up to {state.max_sequences}, {state.vocab_size}] on {state.settings.device}, as the state, "
        f"not {list(logits.shape)} on {logits.device}",
    )
    if past_lengths is not None:
        check_int32("past_lengths", past_lengths, sequences, logits)
    if input_ids is not None:
        check_int32("input_ids", input_ids, sequences, logits)
    if out is None:
        out = logits.new_empty(sequences, dtype=state.seen.dtype)
    check_int32("out", out, sequences, logits)
    with CurrentDevice(logits) as stream:
        core().sample(
            logits=logits.data_ptr(),
            logits_row_stride=logits.stride(0),
            sequences=sequences,
            vocab_size=vocab_size,
            dtype=float_type_number(logits.dtype),
            settings=0 if greedy and not penalty else state.settings.data_ptr(),
            greedy=greedy and penalty,
            seen=state.seen.data_ptr() if penalty else 0,
            tokens=out.data_ptr(),
            input_ids=address(input_ids),
            past_lengths=address(past_lengths),
            workspace=state.workspace.data_ptr(),
            semaphores=state.semaphores.data_ptr(),
            stream=stream,
        )
    return out


def mark_seen(tokens: Tensor, cu_seqlens: Tensor, state: SamplingState) -> None:
    """Mark tokens as seen: the repetition penalty holds for them from now on.

    tokens: int32 [tokens], those of all sequences one after the other; outside of the vocabulary they are ignored.
    cu_seqlens: int32 [sequences + 1], on the device: where each sequence begins, and their end (not checked).
    """
    check_int32("tokens", tokens, len(tokens), state.seen)
    check_int32("cu_seqlens", cu_seqlens, len(cu_seqlens), state.seen)
    sequences = len(cu_seqlens) - 1
    check(
        0 <= sequences <= state.max_sequences,
        f"cu_seqlens must have 1 to {state.max_sequences + 1} elements, not {len(cu_seqlens)}",
    )
    with CurrentDevice(tokens) as stream:
        core().mark_seen(
            tokens=tokens.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(),
            sequences=sequences,
            vocab_size=state.vocab_size,
            seen=state.seen.data_ptr(),
            stream=stream,
        )


def _check_vocab_size(vocab_size: int) -> None:
    limit = core().MAX_VOCAB_SIZE
    check(0 < vocab_size <= limit, f"vocab_size must be from 1 to {limit}, not {vocab_size}")
