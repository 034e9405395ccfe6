"""Define and check the options by which the next token is chosen; each back end chooses on its device."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..checkpoints.json_values import LARGEST_NUMBER, SMALLEST_NUMBER
from ..common.errors import QwenModelError, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MOST_BIASES = 512
"""The most entries of `SamplingOptions.logit_bias`: kMaxBiases of csrc/kernels/sampling/sampling.h."""
MOST_BEST = 128
"""The most tokens whose log-probabilities a step gives: kMaxBest of csrc/kernels/sampling/sampling.h."""


@dataclass(frozen=True)
class SamplingOptions:
    """Say how tokens are chosen: greedily, unless temperature, top_k, top_p or min_p is given.

    They are applied in this order, that of transformers, with the penalties of the output where vLLM has them:
    logit_bias, repetition_penalty, frequency_penalty, presence_penalty, the mask of a step, temperature, top_k, top_p,
    min_p.

    temperature: divides the logits; 0 is greedy. None: 1.0 if top_k, top_p or min_p is given, else greedy.
    top_k: draw from the k most likely tokens; 0: from all.
    top_p: draw from the most likely tokens that together have this probability; 1: from all.
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens seen before (Keskar et al.,
        "CTRL", 2019), in the prompt or the output; it applies to greedy choice, too.
    seed: the same seed, prompts and options on the same machine give the same tokens. None: another seed each time.
    min_p: draw from the tokens with at least this fraction of the probability of the likeliest; 0: from all.
    presence_penalty: is subtracted from the logits of tokens that the output has, as in OpenAI's API: -2 to 2. It
        applies to greedy choice, too, as do the next two.
    frequency_penalty: is subtracted once for each time that the output has a token, as in OpenAI's API: -2 to 2.
    logit_bias: numbers from -100 to 100 that are added to the logits of these tokens, by token id; at most 512.

    Raises:
        QwenModelError: an option is of a wrong type or out of its range.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if option.name != "logit_bias":
                _check_number(option.name, getattr(self, option.name))
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise QwenModelError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise QwenModelError(f"top_k must be at least 0 (0: all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QwenModelError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not SMALLEST_NUMBER <= self.repetition_penalty <= LARGEST_NUMBER:  # beyond this range logits become infinite
            raise QwenModelError(
                f"repetition_penalty must be a number from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}, not "
                f"{self.repetition_penalty}"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise QwenModelError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if not 0 <= self.min_p <= 1:
            raise QwenModelError(f"min_p must be from 0 to 1, not {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise QwenModelError(f"{name} must be from -2 to 2, not {getattr(self, name)}")
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Tell whether the most likely token, after biases, penalties and mask, is taken."""
        if self.temperature is None:
            return self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        """Tell whether the choice depends on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        """Tell whether another token than that of the largest logit may be chosen."""
        return not self.greedy or self.penalizes or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that the model has the tokens of logit_bias.

        Raises:
            QwenModelError: it does not have one.
        """
        if self.logit_bias and max(self.logit_bias) >= vocab_size:
            token = max(self.logit_bias)
            raise QwenModelError(f"logit_bias: token {token} is not in the vocabulary of {vocab_size} tokens")


def _check_number(name: str, value: Any) -> None:
    whole = name in ("top_k", "seed")
    if value is None and name in ("temperature", "seed"):
        return
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise QwenModelError(f"{name} must be {'an integer' if whole else 'a number'}, not {shown(value)}")
    if not whole and isinstance(value, Integral) and abs(int(value)) >= 2**100:
        raise QwenModelError(f"{name} must be below 2**100, not {shown(value)}")


def _checked_biases(biases: Any) -> dict[int, float]:
    """Return a copy of a logit_bias in the order of its tokens."""
    if not isinstance(biases, Mapping):
        raise QwenModelError(f"logit_bias must map token ids to numbers, not {shown(biases)}")
    if len(biases) > MOST_BIASES:
        raise QwenModelError(f"logit_bias may have at most {MOST_BIASES} tokens, not {len(biases)}")
    for token, value in biases.items():
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise QwenModelError(f"logit_bias: a token id must be an integer of at least 0, not {shown(token)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise QwenModelError(f"logit_bias: token {token} must have a number from -100 to 100, not {shown(value)}")
    return {int(token): float(biases[token]) for token in sorted(biases)}


@dataclass(frozen=True)
class SamplingDefaults:
    """Hold how a checkpoint's authors choose tokens, as its `generation_config.json` says.

    do_sample: whether tokens are drawn. If not, temperature, top_k, top_p and min_p apply only where a user gives one
        of them.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise QwenModelError(f"do_sample must be true or false, not {self.do_sample!r}")
        if self.temperature is None:
            raise QwenModelError("temperature must be a number, not None")
        SamplingOptions(self.temperature, self.top_k, self.top_p, self.repetition_penalty, min_p=self.min_p)

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """Read the settings of a `generation_config.json`; top_k -1 means 0, all tokens, as in vLLM.

        Raises:
            QwenModelError: one is of a wrong type or out of its range.
        """
        try:
            return cls(**{**values, **({"top_k": 0} if values.get("top_k") == -1 else {})})
        except QwenModelError as error:
            raise QwenModelError(f"generation_config.json: {error}") from error

    def options(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> SamplingOptions:
        """Return the options of a request that sets these and leaves the others (None) to the checkpoint.

        Tokens are drawn if the checkpoint does or if temperature, top_k, top_p or min_p is given; temperature 0 is
        greedy. Checkpoints have no presence penalty, frequency penalty and biases: without them None means none.
        """
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        others: dict[str, Any] = {
            "seed": seed,
            "presence_penalty": 0.0 if presence_penalty is None else presence_penalty,
            "frequency_penalty": 0.0 if frequency_penalty is None else frequency_penalty,
            "logit_bias": {} if logit_bias is None else logit_bias,
        }
        if not self.do_sample and all(given is None for given in (temperature, top_k, top_p, min_p)):
            return SamplingOptions(repetition_penalty=penalty, **others)
        return SamplingOptions(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            min_p=self.min_p if min_p is None else min_p,
            repetition_penalty=penalty,
            **others,
        )


def seed_of(options: SamplingOptions) -> int:
    """Return the seed of a sequence, a random one if none is given."""
    return secrets.randbits(63) if options.seed is None else options.seed


def check_masks(masks: Mapping[int, npt.NDArray[np.uint32]], vocab_size: int) -> None:
    """Check masks of allowed tokens, see `interface.device.TokenMask`.

    Raises:
        QwenModelError: one is not an array of this type and size.
    """
    import numpy as np  # late: commands check their options without it

    words = (vocab_size + 31) // 32
    for mask in masks.values():
        if not isinstance(mask, np.ndarray) or mask.dtype != np.uint32 or mask.shape != (words,):
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else shown(mask)
            raise QwenModelError(f"a mask of allowed tokens must be uint32 [{words}], not {given}")
