"""Choose the next token of each sequence, for PyTorch tensors on an NVIDIA GPU.

`SamplingState` keeps the state of sequences in slots: their settings, and what the penalties count. `sample` chooses
from rows of logits of any of the slots, `logprobs` gives log-probabilities. All of it is launched on PyTorch's current
stream and does not synchronise; `sample` and `logprobs` can be captured in a CUDA graph, since whatever changes from
step to step is in device memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_plugins._arguments import (
    CurrentDevice,
    address,
    check,
    check_array,
    check_int32,
    check_matrix,
    core,
    data_type,
)
from qwen_plugins.embedding import gather_rows  # noqa: F401  for code that imports it from here
from qwen_plugins.sampling_starts import SequenceStart, counts_row_size, initial_settings, pack_starts

NO_TOKEN = -1
"""The result of `sample` for logits that are not finite: kNoToken of csrc/kernels/sampling/sampling.h."""

__all__ = ["NO_TOKEN", "SamplingState", "SequenceStart", "logprobs", "sample"]


class SamplingState:
    """Keep on the device what `sample` needs of the sequences in some slots, from launch to launch.

    Launches that may overlap must not share a state.

    Attributes:
        slots, vocab_size: their numbers.
        last_tokens: int32 [slots]: the token chosen last in each slot, 0 for NO_TOKEN, so that a next step that is
            launched before the host has read the tokens can look it up.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str, last_tokens: Tensor | None = None):
        """Allocate a state in which every slot takes the largest logit, until a sequence starts there.

        Args:
            slots: from 1 to 2**20 - 1.
            vocab_size: from 1 to 2**19.
            device: an NVIDIA GPU.
            last_tokens: int32 [slots], contiguous; None: in new memory, zeros.

        Raises:
            TypeError, ValueError: for an argument that does not fit.
        """
        check(0 < slots < 2**20, f"slots must be from 1 to {2**20 - 1}, not {slots}")
        limit = core().MAX_VOCAB_SIZE
        check(0 < vocab_size <= limit, f"vocab_size must be from 1 to {limit}, not {vocab_size}")
        target = torch.device(device)
        check(target.type == "cuda", f"device must be an NVIDIA GPU, not {target}")
        self.slots, self.vocab_size = slots, vocab_size
        words = (vocab_size + 31) // 32
        self._settings = torch.from_numpy(initial_settings(slots)).to(target)
        self._biases = torch.empty(slots, core().MAX_BIASES, 2, dtype=torch.int32, device=target)
        self._marks = torch.empty(slots, words, dtype=torch.int32, device=target)
        self._counts: Tensor | None = (
            None  # int16 [slots, counts_row_size(vocab_size)]; allocated with the first penalty
        )
        self._mask_rows = torch.full((slots,), -1, dtype=torch.int32, device=target)
        self._masks = torch.empty(slots, words, dtype=torch.int32, device=target)
        self._masked = False
        self.last_tokens = torch.zeros(slots, dtype=torch.int32, device=target) if last_tokens is None else last_tokens
        check_int32("last_tokens", self.last_tokens, slots, self._settings)
        workspace_bytes = core().sampling_workspace_bytes(slots, vocab_size)
        self._workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=target)
        self._semaphores = torch.zeros(slots, dtype=torch.int32, device=target)
        self._memory = core().SamplingSlots(
            vocab_size=vocab_size,
            settings=self._settings.data_ptr(),
            biases=self._biases.data_ptr(),
            marks=self._marks.data_ptr(),
            mask_rows=self._mask_rows.data_ptr(),
            masks=self._masks.data_ptr(),
            last_tokens=self.last_tokens.data_ptr(),
            workspace=self._workspace.data_ptr(),
            semaphores=self._semaphores.data_ptr(),
        )

    @property
    def device(self) -> torch.device:
        """Return the device of the state."""
        return self._settings.device

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """Set the state of the slots in which sequences start; the others stay as they are.

        Raises:
            ValueError: a slot or a token of a logit_bias does not exist, or a slot is given twice, before anything is
                changed.
        """
        given = [start.slot for start in starts]
        check(len(set(given)) == len(given), f"slots must be different, not {given}")
        for start in starts:
            check(start.slot < self.slots, f"slot must be below {self.slots}, not {start.slot}")
            for token in start.logit_bias:
                check(token < self.vocab_size, f"logit_bias: token {token} is not below vocab_size, {self.vocab_size}")
        if not starts:
            return
        if self._counts is None and any(start.penalizes for start in starts):
            row_size = counts_row_size(self.vocab_size)
            self._counts = torch.empty(self.slots, row_size, dtype=torch.int16, device=self.device)
        packed = pack_starts(starts, address(self._counts), 2 * counts_row_size(self.vocab_size))
        data = _uploaded(packed.data, self.device)
        with CurrentDevice(self._settings) as stream:
            core().start_sampling(
                self._memory,
                starts=data.data_ptr(),
                biases=data.data_ptr() + packed.biases,
                tokens=data.data_ptr() + packed.tokens,
                sequences=len(starts),
                stream=stream,
            )

    def set_masks(self, masks: Mapping[int, npt.NDArray[np.uint32]]) -> None:
        """Let sequences choose allowed tokens alone, until the next call; those of slots that are not given take any.

        Args:
            masks: by slot, uint32 [(vocab_size + 31) // 32]: bit i % 32 of word i // 32 for token i.

        Raises:
            ValueError: a slot does not exist, or a mask has another type or shape, before anything is changed.
        """
        words = (self.vocab_size + 31) // 32
        for slot, mask in masks.items():
            check(0 <= slot < self.slots, f"slot must be from 0 to {self.slots - 1}, not {slot}")
            right = mask.dtype == np.uint32 and mask.shape == (words,)
            check(right, f"a mask must be uint32 [{words}], not {mask.dtype} {list(mask.shape)}")
        if not masks and not self._masked:
            return
        rows = np.full(self.slots, -1, np.int32)
        rows[list(masks)] = np.arange(len(masks))
        if masks:
            packed = np.stack(list(masks.values())).view(np.int32)
            self._masks[: len(masks)].copy_(torch.from_numpy(packed).pin_memory(), non_blocking=True)
        self._mask_rows.copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
        self._masked = bool(masks)


def sample(
    logits: Tensor,
    state: SamplingState,
    slots: Tensor | None = None,
    *,
    largest: bool = False,
    past_lengths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each sequence.

    The order is that of transformers, and of vLLM for what transformers lacks: biases, the repetition penalty of the
    tokens in prompt and output, frequency and presence penalty of those in the output, the mask of allowed tokens,
    temperature, the top_k most likely tokens, of those the most likely ones that together have probability top_p, of
    those the ones with at least min_p times the probability of the likeliest, a draw. A draw depends on the logits, the
    sequence's settings and the number of tokens drawn before alone, whatever else is in the batch.

    Args:
        logits: [sequences, vocab_size], float32, float16 or bfloat16; rows may be strided. Single logits may be
            -infinity: they are never chosen.
        state: of at least as many slots as sequences, and this vocab_size.
        slots: int32 [sequences] on the device of logits: the slot of each row (not checked). Rows may share a slot only
            if it takes the largest logit. None: row i is that of slot i.
        largest: choose the largest logit, the first of equal ones, whatever the settings and masks, which stay as they
            are: the fastest choice where all sequences take it.
        past_lengths: int32 [sequences], on the device of logits: 1 is added to each.
        out: int32 [sequences], where the tokens are written, contiguous; None: in new memory.

    Returns:
        The tokens, int32 [sequences]; NO_TOKEN (-1) for a sequence whose logits have NaN or +infinity, or of which none
        above -infinity is allowed. They are written to `state.last_tokens`, too, by slot, with 0 for NO_TOKEN.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    check_matrix("logits", logits)
    sequences, vocab_size = logits.shape
    right = sequences <= state.slots and vocab_size == state.vocab_size and logits.device == state.device
    check(
        right,
        f"logits must be [up to {state.slots}, {state.vocab_size}] on {state.device}, as the state, "
        f"not {list(logits.shape)} on {logits.device}",
    )
    if slots is not None:
        check_int32("slots", slots, sequences, logits)
    if past_lengths is not None:
        check_int32("past_lengths", past_lengths, sequences, logits)
    if out is None:
        out = logits.new_empty(sequences, dtype=torch.int32)
    check_int32("out", out, sequences, logits)
    with CurrentDevice(logits) as stream:
        core().sample(
            state._memory,
            logits=logits.data_ptr(),
            logits_row_stride=logits.stride(0),
            sequences=sequences,
            dtype=data_type(logits.dtype),
            slots=address(slots),
            largest=largest,
            tokens=out.data_ptr(),
            stream=stream,
            past_lengths=address(past_lengths),
        )
    return out


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of the softmax of each row of logits, as they are.

    They do not depend on the number of rows.

    Args:
        logits: [sequences, vocab_size], float32, float16 or bfloat16; rows may be strided. Single logits may be
            -infinity.
        tokens: int32 [sequences], on the device of logits.
        num_best: how many of the most likely tokens are wanted, 0 to 128.

    Returns:
        The log-probabilities of `tokens`, float32 [sequences], NaN for a token outside of the vocabulary; the most
        likely tokens, best first, of equal ones the lowest first, int32 [sequences, num_best], NO_TOKEN where there are
        fewer; theirs, float32 [sequences, num_best], -infinity where there are fewer. For a sequence whose logits have
        NaN or +infinity, or are all -infinity, NaN and NO_TOKEN.

    Raises:
        TypeError, ValueError: for an argument that does not fit.
    """
    check_matrix("logits", logits)
    sequences, vocab_size = logits.shape
    check(0 < vocab_size <= core().MAX_VOCAB_SIZE, f"vocab_size must be from 1 to {core().MAX_VOCAB_SIZE}")
    check(0 <= num_best <= core().MAX_BEST, f"num_best must be from 0 to {core().MAX_BEST}, not {num_best}")
    check_array("tokens", tokens, torch.int32, (sequences,), logits)
    chosen = logits.new_empty(sequences, dtype=torch.float32)
    best_tokens = logits.new_empty(sequences, num_best, dtype=torch.int32)
    best = logits.new_empty(sequences, num_best, dtype=torch.float32)
    with CurrentDevice(logits) as stream:
        core().logprobs(
            logits=logits.data_ptr(),
            logits_row_stride=logits.stride(0),
            sequences=sequences,
            vocab_size=vocab_size,
            dtype=data_type(logits.dtype),
            num_best=num_best,
            tokens=tokens.data_ptr(),
            logprobs=chosen.data_ptr(),
            best_tokens=best_tokens.data_ptr(),
            best_logprobs=best.data_ptr(),
            stream=stream,
        )
    return chosen, best_tokens, best


def _uploaded(array: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
