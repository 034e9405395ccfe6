"""Choose the next token of each sequence, for PyTorch tensors on an NVIDIA GPU.

`sample` chooses, `mark_seen` marks the tokens of prompts for the repetition penalty. Both launch on PyTorch's current
stream, do not synchronise, and can be captured in a CUDA graph: a request's settings are in device memory
(`SamplingState`).
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
    check_is_tensor,
    check_matrix,
    core,
    data_type,
)
from qwen_plugins.embedding import gather_rows  # noqa: F401  for code that imports it from here

LARGEST_FLOAT32 = torch.finfo(torch.float32).max
NO_TOKEN = -1
"""The result of `sample` for logits that are not finite: kNoToken of csrc/kernels/sampling/sampling.h."""


@dataclass(frozen=True)
class SamplingState:
    """Holds what `sample` keeps on the device from launch to launch; `sampling_state` makes one."""

    max_sequences: int
    vocab_size: int
    settings: Tensor  # uint8: SamplingSettings of csrc/kernels/sampling/sampling.h
    seen: Tensor  # int32 [max_sequences, (vocab_size + 31) // 32]: bits of the tokens that the penalty holds for
    workspace: Tensor  # uint8; contents do not matter between launches
    semaphores: Tensor  # int32 [max_sequences + 1]; zero between launches

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
        """Begin a request: set its settings and mark no token as seen, on PyTorch's current stream, without waiting.

        Args:
            temperature: above 0.
            top_k: how many of the most likely tokens may be chosen; 0: all.
            top_p: above 0, at most 1: the most likely tokens that together have this probability may be chosen.
            repetition_penalty: above 0; 1: none.
            seed: from 0 to 2**64 - 1.
            step: number of the first draw, from 0 to 2**64 - 1.

        Raises:
            ValueError: for a value out of range, before anything is changed.
        """
        _check_positive("temperature", temperature)
        check(0 <= top_k < 2**31, f"top_k must be at least 0, not {top_k}")
        check(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
        _check_positive("repetition_penalty", repetition_penalty)
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
    """Allocate a state for up to `max_sequences` sequences, with the defaults of `SamplingState.set`.

    Args:
        max_sequences: from 1 to 2**20 - 1.
        vocab_size: from 1 to 2**19.
        device: an NVIDIA GPU.

    Raises:
        ValueError: for an argument out of range.
    """
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
    """Choose the next token of each sequence.

    The order is that of transformers: the repetition penalty of the tokens seen, the temperature, the top_k most likely
    tokens, of those the most likely ones that together have probability top_p, a draw. A draw depends on the logits,
    the state's settings, the number of the draw and the place in the batch alone. Every draw adds 1 to the step in the
    settings.

    Args:
        logits: [sequences, vocab_size], float32, float16 or bfloat16; rows may be strided. Single logits may be
            -infinity: they are never chosen.
        state: of `sampling_state`, for at least as many sequences and this vocab_size. Launches that may overlap must
            not share it.
        greedy: choose the largest logit after the penalty, the first of equal ones.
        penalty: apply the repetition penalty, and mark the chosen tokens as seen. A greedy choice without the penalty
            uses no settings, and leaves them as they are.
        past_lengths: int32 [sequences], on the device of logits: 1 is added to each.
        input_ids: int32 [sequences], on the device of logits: gets the tokens, with 0 for NO_TOKEN, for a next step
            that is launched before the host has read the tokens.
        out: int32 [sequences], where the tokens are written, contiguous; None: in new memory.

    Returns:
        The tokens, int32 [sequences]; NO_TOKEN (-1) for a sequence whose logits have NaN or +infinity, or are all
        -infinity.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
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
            dtype=data_type(logits.dtype),
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
    """Mark tokens as seen, so that the repetition penalty holds for them.

    Args:
        tokens: int32 [tokens], those of all sequences one after the other; tokens outside of the vocabulary are
            ignored.
        cu_seqlens: int32 [sequences + 1]: 0, then where each sequence ends in tokens (not checked).
        state: of `sampling_state`, on the same device; sequence i is that of row i of the logits.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    check_is_tensor("tokens", tokens)
    check_is_tensor("cu_seqlens", cu_seqlens)
    check_int32("tokens", tokens, tokens.numel(), state.seen)
    check_int32("cu_seqlens", cu_seqlens, cu_seqlens.numel(), state.seen)
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


def _check_positive(name: str, value: float) -> None:
    # Beyond float32 it would be infinity, and infinity times a logit of 0 or -infinity is NaN.
    check(0 < value <= LARGEST_FLOAT32, f"{name} must be above 0 and at most {LARGEST_FLOAT32:.2e}, not {value}")


def _check_vocab_size(vocab_size: int) -> None:
    limit = core().MAX_VOCAB_SIZE
    check(0 < vocab_size <= limit, f"vocab_size must be from 1 to {limit}, not {vocab_size}")
