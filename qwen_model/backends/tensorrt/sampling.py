"""Choose the next tokens on the GPU with our kernels (csrc/kernels/sampling/sampling.h), without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_plugins import launch
from qwen_plugins.sampling_starts import counts_row_size, initial_settings, pack_starts

from ...interface.device import Int32Array, Start, TokenMask
from ...interface.kernel_sampling import sequence_starts
from ...interface.sampling import check_masks
from . import cuda_runtime as cuda


class SlotSampler:
    """Own the kernels' state of the sequences in some slots; no call waits for the device.

    A draw depends on the logits, the seed, `Start.draws` and the number of tokens drawn before alone, whatever else is
    chosen with it and from whichever row.

    Attributes:
        last_tokens: device address of int32 [max_sequences + 1]: the tokens chosen last, by slot, 0 for NO_TOKEN. The
            last one is of the slot that padded rows have.
    """

    def __init__(
        self, max_sequences: int, vocab_size: int, dtype: str, stream: cuda.Stream, last_tokens: int | None = None
    ):
        """Allocate what the kernels need for logits [up to max_sequences, vocab_size] of this type.

        Slots choose greedily until a sequence starts there.

        last_tokens: where they are written; None: in memory of the sampler.
        """
        slots, words = max_sequences + 1, (vocab_size + 31) // 32
        self._slots, self._vocab_size, self._stream = slots, vocab_size, stream
        self._dtype = getattr(launch.DataType, dtype)
        settings = initial_settings(slots)
        self._settings = cuda.DeviceArray(settings.shape, np.uint8)
        self._settings.upload(settings, stream)
        self._biases = cuda.DeviceArray((slots, launch.MAX_BIASES, 2), np.int32)
        self._marks = cuda.DeviceArray((slots, words), np.uint32)
        self._counts: cuda.DeviceArray | None = None  # allocated with the first penalty
        self._masks = cuda.DeviceArray((slots, words), np.uint32)
        self._mask_rows = cuda.DeviceArray((slots,), np.int32)
        self._mask_rows.upload(np.full(slots, -1, np.int32), stream)
        self._masked = False
        self._own_tokens: cuda.DeviceArray | None = None
        if last_tokens is None:
            self._own_tokens = cuda.DeviceArray((slots,), np.int32)
            self._own_tokens.fill(0, stream)
            last_tokens = self._own_tokens.address
        self.last_tokens = last_tokens
        self._workspace = cuda.DeviceMemory(launch.sampling_workspace_bytes(slots, vocab_size))
        self._semaphores = cuda.DeviceArray((slots,), np.int32)
        self._semaphores.fill(0, stream)
        self._starts = cuda.DeviceArray((0,), np.uint8)
        self._general = np.zeros(slots, bool)  # by slot: it does not just take the largest logit
        self._memory = launch.SamplingSlots(
            vocab_size=vocab_size,
            settings=self._settings.address,
            biases=self._biases.address,
            marks=self._marks.address,
            mask_rows=self._mask_rows.address,
            masks=self._masks.address,
            last_tokens=last_tokens,
            workspace=self._workspace.address,
            semaphores=self._semaphores.address,
        )

    def start(self, sequences: Sequence[Start]) -> None:
        """Set the state of slots.

        Raises:
            QwenModelError: a token of a logit_bias is not in the vocabulary.
        """
        starts = sequence_starts(sequences, self._vocab_size)
        if not starts:
            return
        row_size = counts_row_size(self._vocab_size)
        if self._counts is None and any(start.penalizes for start in starts):
            self._counts = cuda.DeviceArray((self._slots, row_size), np.uint16)
        packed = pack_starts(starts, 0 if self._counts is None else self._counts.address, 2 * row_size)
        if packed.data.nbytes > self._starts.num_bytes:
            self._starts = cuda.DeviceArray((2 * packed.data.nbytes,), np.uint8)  # frees the other one, which waits
        self._starts.upload(packed.data, self._stream)
        launch.start_sampling(
            self._memory,
            starts=self._starts.address,
            biases=self._starts.address + packed.biases,
            tokens=self._starts.address + packed.tokens,
            sequences=len(starts),
            stream=self._stream.handle,
        )
        for start in starts:
            self._general[start.slot] = not start.takes_largest

    def set_masks(self, masks: Mapping[int, TokenMask]) -> None:
        """Let the next `choose` take allowed tokens alone, for these slots; those of others may take any.

        Raises:
            QwenModelError: a mask is not of the vocabulary's size.
        """
        check_masks(masks, self._vocab_size)
        if not masks and not self._masked:
            return
        rows = np.full(self._slots, -1, np.int32)
        rows[list(masks)] = np.arange(len(masks))
        if masks:
            self._masks.upload(np.stack(list(masks.values())), self._stream)
        self._mask_rows.upload(rows, self._stream)
        self._masked = bool(masks)

    def variant(self, slots: Int32Array, masked: bool = False) -> bool:
        """Return whether for one of these slots more than the largest logit counts; a captured `choose` depends on it.

        masked: whether masks are set for a slot.
        """
        return bool(masked or self._general[slots].any())

    def choose(self, logits: int, slots: int, count: int, variant: bool, tokens: int, past_lengths: int = 0) -> None:
        """Choose from logits [count, vocab_size], those of the sequences in `slots`; all operands are addresses.

        slots: int32 [count].
        tokens: gets the tokens, int32 [count], NO_TOKEN where the logits are not finite, or none is allowed.
        past_lengths: int32 [count]: 1 is added to each; 0: none.
        """
        launch.sample(
            self._memory,
            logits=logits,
            logits_row_stride=self._vocab_size,
            sequences=count,
            dtype=self._dtype,
            slots=slots,
            largest=not variant,
            tokens=tokens,
            stream=self._stream.handle,
            past_lengths=past_lengths,
        )

    def logprobs(
        self, logits: int, tokens: int, count: int, num_best: int, logprobs: int, best_tokens: int, best_logprobs: int
    ) -> None:
        """Compute log-probabilities of the softmax of logits [count, vocab_size] as they are; operands are addresses.

        tokens: int32 [count].
        logprobs: gets those of the tokens, float32 [count], NaN for NO_TOKEN and where logits are not finite.
        best_tokens: gets the most likely ones, int32 [count, num_best], best first, of equal ones the lowest first.
        best_logprobs: gets theirs, float32 [count, num_best].
        """
        launch.logprobs(
            logits=logits,
            logits_row_stride=self._vocab_size,
            sequences=count,
            vocab_size=self._vocab_size,
            dtype=self._dtype,
            num_best=num_best,
            tokens=tokens,
            logprobs=logprobs,
            best_tokens=best_tokens,
            best_logprobs=best_logprobs,
            stream=self._stream.handle,
        )
