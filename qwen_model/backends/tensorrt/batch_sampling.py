"""Choose the next tokens on the GPU with our kernel (csrc/kernels/sampling/sampling.h), without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_plugins import launch

from ...interface.sampling import Choice, SamplingOptions, kernel_settings
from . import cuda_runtime as cuda


class DeviceSampler:
    """Own the kernel's settings and buffers, for one batch at a time; no call waits for the device."""

    def __init__(self, max_batch_size: int, vocab_size: int, dtype: str, stream: cuda.Stream):
        """Allocate what the kernel needs for logits [up to max_batch_size, vocab_size] of this type."""
        self._vocab_size = vocab_size
        self._dtype = getattr(launch.DataType, dtype)
        self._stream = stream
        settings = np.frombuffer(_settings(SamplingOptions(), vocab_size), np.uint8)
        self._settings = cuda.DeviceArray(settings.shape, np.uint8)
        self._settings.upload(settings, stream)
        self._seen = cuda.DeviceArray((max_batch_size, (vocab_size + 31) // 32), np.uint32)
        self._seen.fill(0, stream)
        self._workspace = cuda.DeviceMemory(launch.sampling_workspace_bytes(max_batch_size, vocab_size))
        self._semaphores = cuda.DeviceArray((max_batch_size + 1,), np.int32)
        self._semaphores.fill(0, stream)

    def begin(self, options: SamplingOptions, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a batch; the prompts' tokens count as seen."""
        if not options.changes_logits:
            return
        self._settings.upload(np.frombuffer(_settings(options, self._vocab_size), np.uint8), self._stream)
        if options.repetition_penalty != 1.0:
            self._seen.upload(seen_bits(prompts, self._vocab_size), self._stream)

    def choose(
        self,
        logits: cuda.DeviceArray,
        choice: Choice,
        count: int,
        tokens: cuda.DeviceArray,
        input_ids: cuda.DeviceArray,
        past_lengths: cuda.DeviceArray | None,
    ) -> None:
        """Choose from the first `count` rows of logits, and add 1 to the past lengths, if given.

        tokens: gets the tokens, NO_TOKEN where the logits are not finite.
        input_ids: gets the same, with 0 for NO_TOKEN.
        """
        # Without settings the kernel takes the largest logit; with them, `greedy` means the largest after the penalty.
        without_settings = choice == Choice(greedy=True, penalty=False)
        launch.sample(
            logits=logits.address,
            logits_row_stride=self._vocab_size,
            sequences=count,
            vocab_size=self._vocab_size,
            dtype=self._dtype,
            settings=0 if without_settings else self._settings.address,
            greedy=choice.greedy and not without_settings,
            seen=self._seen.address if choice.penalty else 0,
            tokens=tokens.address,
            input_ids=input_ids.address,
            past_lengths=0 if past_lengths is None else past_lengths.address,
            workspace=self._workspace.address,
            semaphores=self._semaphores.address,
            stream=self._stream.handle,
        )


def _settings(options: SamplingOptions, vocab_size: int) -> bytes:
    """Return the options as the bytes of the kernel's SamplingSettings."""
    return launch.sampling_settings_bytes(**kernel_settings(options, vocab_size), step=0)


def seen_bits(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Return the tokens that each prompt has as bits, uint32 [prompts, ceil(vocab_size / 32)].

    Token i is bit i % 32 of word i // 32.
    """
    words = (vocab_size + 31) // 32
    seen = np.zeros((len(prompts), words * 32), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[np.asarray(prompt)] = True
    return np.packbits(seen, axis=-1, bitorder="little").view("<u4")
