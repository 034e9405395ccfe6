"""Choosing the next token, on the device of the logits and without waiting for it: with our kernel, or with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...interface.sampling import Choice, SamplingOptions, kernel_settings


class KernelSampler:
    """The choice of tokens of an executor's batches, one after the other, by our kernel on an NVIDIA GPU."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        """Sequences and vocabulary of the logits; what the kernel needs is allocated now."""
        from qwen_plugins.sampling import sampling_state

        self._state = sampling_state(max_sequences, vocab_size, device)

    def begin(self, options: SamplingOptions, tokens: Tensor, cu_seqlens: Tensor) -> None:
        """Begin a batch; the prompts' tokens, packed, count as seen."""
        from qwen_plugins.sampling import mark_seen

        if not options.changes_logits:
            return
        self._state.set(**kernel_settings(options, self._state.vocab_size))
        if options.repetition_penalty != 1.0:
            mark_seen(tokens, cu_seqlens, self._state)

    def __call__(self, logits: Tensor, choice: Choice, tokens: Tensor, past_lengths: Tensor | None) -> None:
        """Put the tokens [sequences] of logits [sequences, vocab_size] into `tokens`; add 1 to the lengths."""
        from qwen_plugins.sampling import sample

        sample(
            logits,
            self._state,
            greedy=choice.greedy,
            penalty=choice.penalty,
            past_lengths=past_lengths,
            out=tokens,
        )


class TorchSampler:
    """One batch's choice of tokens with PyTorch; keeps which tokens each sequence has seen, and the random numbers."""

    def __init__(
        self, options: SamplingOptions, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ):
        """Begin a batch; the prompts' tokens count as seen."""
        self.options = options
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        self._seen: Tensor | None = None
        if options.repetition_penalty != 1.0:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[torch.tensor(prompt)] = True
            self._seen = seen.to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens [sequences] from logits [sequences, vocab_size]."""
        if self.options.changes_logits:
            logits = logits.float()
        if self._seen is not None:
            penalty = self.options.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        tokens = logits.argmax(-1) if self.options.greedy else self._draw(logits)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _draw(self, logits: Tensor) -> Tensor:
        options = self.options
        if options.temperature is not None:
            # The largest becomes 0: by a very low temperature others may become infinite, and only these.
            logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
        candidates = None
        if 0 < options.top_k < logits.shape[-1]:
            logits, candidates = logits.topk(options.top_k)
        elif options.top_p < 1.0:
            logits, candidates = logits.sort(descending=True)
        probabilities = logits.softmax(-1)
        if options.top_p < 1.0:
            before = probabilities.cumsum(-1) - probabilities  # of the tokens that are likelier: 0 for the likeliest
            probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
        # The largest of p / e, e exponentially distributed, is a draw from p; unlike torch.multinomial it never makes
        # the host wait for the GPU.
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        drawn = (probabilities / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)
        return drawn if candidates is None else candidates.gather(-1, drawn[:, None])[:, 0]
