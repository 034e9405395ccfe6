"""The choice of tokens in float64: how likely each is, for one row of logits."""

import numpy as np

from qwen_plugins.sampling_starts import SequenceStart


def processed(logits: np.ndarray, start: SequenceStart, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits after biases, penalties and the mask, uint32 words of bits."""
    values = logits.astype(np.float64)
    for token, bias in start.logit_bias.items():
        values[token] += bias
    prompt, output = (count_tokens(part, len(values)) for part in (start.prompt, start.output))
    penalty = start.repetition_penalty
    values = np.where(prompt + output > 0, np.where(values > 0, values / penalty, values * penalty), values)
    values = values - start.frequency_penalty * output - start.presence_penalty * (output > 0)
    if mask is not None:
        values[~allowed_tokens(mask, len(values))] = -np.inf
    return values


def probabilities(logits: np.ndarray, start: SequenceStart, mask: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of the tokens; of equal logits at a limit the first stay. All 0: there is no token."""
    values = processed(logits, start, mask)
    result = np.zeros_like(values)
    if not np.isfinite(logits[~np.isneginf(logits)].astype(np.float64)).all() or not np.isfinite(values.max()):
        return result
    order = np.argsort(-values, kind="stable")
    if start.greedy:
        result[order[0]] = 1
        return result
    if start.top_k:
        order = order[: start.top_k]
    weights = np.exp((values[order] - values[order[0]]) / start.temperature)
    weights /= weights.sum()
    if start.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), start.top_p)) + 1
        order, weights = order[:kept], weights[:kept]
    weights = np.where(weights >= start.min_p * weights[0], weights, 0)
    result[order] = weights / weights.sum()
    return result


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax of finite logits."""
    values = logits.astype(np.float64) - logits.max()
    return values - np.log(np.exp(values).sum())


def best_tokens(logits: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the largest logits, of equal ones the lowest first."""
    return np.argsort(-logits.astype(np.float64), kind="stable")[:count]


def count_tokens(tokens, vocab_size: int) -> np.ndarray:
    """How often there is each token; those outside of the vocabulary are ignored."""
    known = np.asarray(tokens, np.int64)
    return np.bincount(known[(known >= 0) & (known < vocab_size)], minlength=vocab_size)


def allowed_tokens(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """The bits of a mask as bool [vocab_size]."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


def mask_of(tokens, vocab_size: int) -> np.ndarray:
    """The mask that allows these tokens alone."""
    bits = np.zeros((vocab_size + 31) // 32 * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)
