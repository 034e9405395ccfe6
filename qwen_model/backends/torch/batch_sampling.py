"""Choose the next tokens on the logits' device, without waiting for it: with our kernel, or with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...interface.executor import NO_TOKEN
from ...interface.sampling import Choice, SamplingOptions, kernel_settings


class KernelSampler:
    """Choose tokens with our kernel, on an NVIDIA GPU, for one batch after the other."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        """Allocate what the kernel needs for logits [up to max_sequences, vocab_size]."""
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

    def __call__(
        self, logits: Tensor, choice: Choice, tokens: Tensor, input_ids: Tensor, past_lengths: Tensor | None
    ) -> None:
        """Choose from logits [sequences, vocab_size], and add 1 to the past lengths, if given.

        tokens: gets the tokens [sequences], NO_TOKEN where the logits are not finite.
        input_ids: gets the same, with 0 for NO_TOKEN.
        """
        from qwen_plugins.sampling import sample

        sample(
            logits,
            self._state,
            greedy=choice.greedy,
            penalty=choice.penalty,
            past_lengths=past_lengths,
            input_ids=input_ids,
            out=tokens,
        )


class TorchSampler:
    """Choose the tokens of one batch with PyTorch, and keep which tokens each sequence has seen."""

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
        """Return tokens, int64 [sequences], for logits [sequences, vocab_size]; NO_TOKEN where these are not finite."""
        if self.options.changes_logits:
            logits = logits.float()
        if self._seen is not None:
            penalty = self.options.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        largest, tokens = logits.max(-1)  # NaN where one is
        if not self.options.greedy:
            tokens = self._draw(logits, largest)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return torch.where(largest.isfinite(), tokens, NO_TOKEN)

    def _draw(self, logits: Tensor, largest: Tensor) -> Tensor:
        options = self.options
        if options.temperature is not None:
            # The largest becomes 0, so that a very low temperature can make only the others infinite.
            logits = (logits - largest[:, None]) / options.temperature
        candidates = None
        if 0 < options.top_k < logits.shape[-1]:
            logits, candidates = logits.topk(options.top_k)
        elif options.top_p < 1.0:
            logits, candidates = logits.sort(descending=True)
        probabilities = logits.softmax(-1)
        if options.top_p < 1.0:
            before = probabilities.cumsum(-1) - probabilities  # the sum over likelier tokens
            probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
        # The largest of p / e, e exponentially distributed, is a draw from p; unlike torch.multinomial it never makes
        # the host wait for the GPU.
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        drawn = (probabilities / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)
        return drawn if candidates is None else candidates.gather(-1, drawn[:, None])[:, 0]
