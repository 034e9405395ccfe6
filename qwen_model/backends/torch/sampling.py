"""Choose the next tokens on the logits' device, without waiting for it: with our kernels, or with PyTorch.

`KernelSampler` and `TorchSampler` have the same interface. The state of a sequence is in a slot: its options, how many
tokens were drawn, and what the penalties count. A draw depends on the logits, the seed, `Start.draws` and the number of
tokens drawn before alone, whatever else is chosen with it and from whichever row.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...interface.device import NO_TOKEN, Int32Array, Start, TokenMask
from ...interface.kernel_sampling import sequence_starts
from ...interface.sampling import SamplingOptions, check_masks, seed_of


class KernelSampler:
    """Choose tokens with our kernels, on an NVIDIA GPU."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device, last_tokens: Tensor | None = None):
        """See `TorchSampler`; allocate what the kernels need for logits [up to max_sequences, vocab_size]."""
        from qwen_plugins.sampling import SamplingState

        self._state = SamplingState(max_sequences + 1, vocab_size, device, last_tokens)
        self._general = np.zeros(max_sequences + 1, bool)  # by slot: it does not just take the largest logit
        self.last_tokens = self._state.last_tokens

    def start(self, sequences: Sequence[Start]) -> None:
        """See `TorchSampler`."""
        starts = sequence_starts(sequences, self._state.vocab_size)
        self._state.start(starts)
        for start in starts:
            self._general[start.slot] = not start.takes_largest

    def set_masks(self, masks: Mapping[int, TokenMask]) -> None:
        """See `TorchSampler`."""
        check_masks(masks, self._state.vocab_size)
        self._state.set_masks(masks)

    def variant(self, slots: Int32Array, masked: bool = False) -> Hashable:
        """Return which of two kernels chooses for these slots: whether it must be more than the largest logit.

        masked: whether masks are set for a slot.
        """
        return bool(masked or self._general[slots].any())

    def choose(self, logits: Tensor, slots: Tensor, variant: Hashable) -> Tensor:
        """See `TorchSampler`; a captured call serves all slots of its variant, and allocates its result alone."""
        from qwen_plugins.sampling import sample

        return sample(logits, self._state, slots, largest=not variant)

    def logprobs(self, logits: Tensor, tokens: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `TorchSampler`."""
        from qwen_plugins.sampling import logprobs

        return logprobs(logits, tokens, num_best)


class TorchSampler:
    """Choose tokens with PyTorch, on any device."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device, last_tokens: Tensor | None = None):
        """Begin with slots that choose greedily.

        last_tokens: int32 [max_sequences + 1], gets the tokens by slot, 0 for NO_TOKEN; None: in new memory. The last
            one is of the slot that padded rows have.
        """
        self._vocab_size = vocab_size
        self._device = device
        self.last_tokens = _last_tokens(max_sequences, device) if last_tokens is None else last_tokens
        self._sequences: dict[int, _Sequence] = {}  # by slot; those that take the largest logit have none
        self._masks: dict[int, Tensor] = {}  # by slot, bool [vocab_size]

    def start(self, sequences: Sequence[Start]) -> None:
        """Set the state of slots.

        Raises:
            QwenModelError: a token of a logit_bias is not in the vocabulary.
        """
        for start in sequences:
            start.sampling.check_vocabulary(self._vocab_size)
        for start in sequences:
            self._sequences.pop(start.slot, None)
            if start.sampling.changes_logits:
                self._sequences[start.slot] = _Sequence.of(start, self._vocab_size, self._device)

    def set_masks(self, masks: Mapping[int, TokenMask]) -> None:
        """Let the next `choose` take allowed tokens alone, for these slots; those of others may take any.

        Raises:
            QwenModelError: a mask is not of the vocabulary's size.
        """
        check_masks(masks, self._vocab_size)
        self._masks = {}
        for slot, mask in masks.items():
            bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")[: self._vocab_size]
            self._masks[slot] = torch.from_numpy(bits.astype(bool)).to(self._device)

    def variant(self, slots: Int32Array, masked: bool = False) -> Hashable:
        """Return what `choose` needs to know of the slots on the host.

        masked: whether masks are set for a slot.
        """
        return tuple(slots.tolist())

    def choose(self, logits: Tensor, slots: Tensor, variant: Hashable) -> Tensor:
        """Choose a token from each row of logits [n, vocab_size], those of the sequences in `slots`, [n].

        Returns: int32 [n], NO_TOKEN where the logits are not finite, or none is allowed.
        """
        largest, tokens = logits.max(-1)  # NaN where one is
        tokens = torch.where(largest.isfinite(), tokens, NO_TOKEN).int()
        assert isinstance(variant, tuple)
        for row, slot in enumerate(variant):
            sequence, mask = self._sequences.get(slot), self._masks.get(slot)
            if sequence is not None:
                tokens[row] = sequence.choose(logits[row], mask)
            elif mask is not None:
                tokens[row] = _largest(_masked(logits[row].float(), mask))
        self.last_tokens[slots.long()] = tokens.clamp(min=0)
        return tokens

    def logprobs(self, logits: Tensor, tokens: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the softmax of each row of logits, as they are, [n, vocab_size].

        tokens: those whose log-probabilities are wanted, int32 [n].

        Returns: those of `tokens`, float32 [n]; the most likely tokens, best first, of equal ones the lowest first,
            int32 [n, num_best]; theirs, float32 [n, num_best]. NaN for NO_TOKEN and where logits are not finite;
            NO_TOKEN for the most likely where there is none.
        """
        logits = logits.float()
        known = logits.max(-1).values.isfinite()[:, None]
        sums = torch.where(known, logits.logsumexp(-1, keepdim=True), torch.nan)
        chosen = logits.gather(-1, tokens.clamp(min=0).long()[:, None]) - sums
        count = min(num_best, self._vocab_size)
        best_tokens = torch.full((len(logits), num_best), NO_TOKEN, dtype=torch.int32, device=logits.device)
        best = torch.full((len(logits), num_best), -torch.inf, device=logits.device)
        if count:
            found = torch.stack([_most_likely(row, count) for row in logits.nan_to_num(nan=0.0)])
            best_tokens[:, :count] = torch.where(known, found.int(), NO_TOKEN)
            best[:, :count] = logits.gather(-1, found) - sums
        return (
            torch.where(tokens == NO_TOKEN, torch.nan, chosen[:, 0]),
            best_tokens,
            torch.where(known, best, torch.nan),
        )


@dataclass
class _Sequence:
    """Hold the state of a slot that does not take the largest logit."""

    options: SamplingOptions
    vocab_size: int
    seed: int
    draws: int
    step: int  # tokens chosen so far
    in_prompt: Tensor | None  # bool [vocab_size]; None: no penalties
    in_output: Tensor | None  # int32 [vocab_size]: how often
    biased: tuple[Tensor, Tensor] | None  # tokens and what is added to their logits

    @classmethod
    def of(cls, start: Start, vocab_size: int, device: torch.device) -> _Sequence:
        """Return the state with which a sequence starts."""
        options = start.sampling
        in_prompt = in_output = biased = None
        if options.penalizes:
            prompt, output = (
                np.bincount(np.asarray(part, np.int64), minlength=vocab_size) for part in (start.prompt, start.output)
            )
            in_prompt = torch.from_numpy(prompt > 0).to(device)
            in_output = torch.from_numpy(output.astype(np.int32)).to(device)
        if options.logit_bias:
            added = torch.tensor(list(options.logit_bias.values()), dtype=torch.float32)
            biased = torch.tensor(list(options.logit_bias)).to(device), added.to(device)
        return cls(options, vocab_size, seed_of(options), start.draws, len(start.output), in_prompt, in_output, biased)

    def choose(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Return a token for logits [vocab_size], an integer of no dimensions, and count it."""
        logits = _masked(self._processed(logits.float()), mask)
        token = _largest(logits)
        if not self.options.greedy:
            drawn = self._draw(torch.where(token == NO_TOKEN, 0.0, logits))  # which fails for NaN
            token = torch.where(token == NO_TOKEN, NO_TOKEN, drawn)
        if self.in_output is not None:
            self.in_output.index_add_(0, token.clamp(min=0)[None], (token != NO_TOKEN).int()[None])
        self.step += 1
        return token

    def _processed(self, logits: Tensor) -> Tensor:
        """Return the logits after biases and penalties."""
        if self.biased is not None:
            logits = logits.index_add(0, *self.biased)
        if self.in_prompt is None or self.in_output is None:
            return logits
        penalty = self.options.repetition_penalty
        if penalty != 1.0:
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.in_prompt | (self.in_output > 0), penalised, logits)
        return (
            logits
            - self.options.frequency_penalty * self.in_output
            - self.options.presence_penalty * (self.in_output > 0)
        )

    def _draw(self, logits: Tensor) -> Tensor:
        options = self.options
        if options.temperature is not None:
            # The largest becomes 0, so that a very low temperature can make only the others infinite.
            logits = (logits - logits.max()) / options.temperature
        candidates = None
        if 0 < options.top_k < len(logits) or options.top_p < 1.0:
            candidates = _most_likely(logits, options.top_k or len(logits))
            logits = logits[candidates]
        probabilities = logits.softmax(-1)
        if options.top_p < 1.0:
            before = probabilities.cumsum(-1) - probabilities  # the sum over likelier tokens
            probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
        probabilities = probabilities.masked_fill(probabilities < options.min_p * probabilities.max(), 0.0)
        # The largest of p / e, e exponentially distributed, is a draw from p.
        noise = self._noise().to(logits.device)
        drawn = (probabilities / (noise if candidates is None else noise[candidates])).argmax(-1)
        return drawn if candidates is None else candidates[drawn]

    def _noise(self) -> Tensor:
        """Return a positive number for each token, exponentially distributed, by seed, draws and step alone."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.draws], counter=[0, 0, 0, self.step]))
        noise = generator.standard_exponential(self.vocab_size, np.float32)
        return torch.from_numpy(noise).clamp_(min=torch.finfo(torch.float32).tiny)


def _last_tokens(max_sequences: int, device: torch.device) -> Tensor:
    return torch.zeros(max_sequences + 1, dtype=torch.int32, device=device)


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits with -infinity for tokens that are not allowed; what is not finite stays."""
    return logits if mask is None else torch.where(mask | ~(logits < torch.inf), logits, -torch.inf)


def _largest(logits: Tensor) -> Tensor:
    """Return the first of the largest logits, or NO_TOKEN."""
    largest, token = logits.max(-1)
    return torch.where(largest.isfinite(), token, NO_TOKEN)


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Return the tokens of the `count` largest logits, largest first, of equal ones the lowest first."""
    if count >= len(logits):
        return logits.argsort(descending=True, stable=True)
    least = logits.topk(count).values[-1]  # topk takes any of equal ones
    larger, equal = logits > least, logits == least
    tokens = (larger | (equal & (equal.cumsum(-1) <= count - larger.sum()))).nonzero()[:, 0]
    return tokens[logits[tokens].argsort(descending=True, stable=True)]
