"""How the next token is chosen: the options, checked. Each back end chooses on its own device."""

from __future__ import annotations

import dataclasses
import math
import secrets
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, TypedDict

from ..common.errors import QwenModelError


@dataclass(frozen=True)
class SamplingOptions:
    """Greedy unless temperature, top_k or top_p is given; in that order they are applied, as in transformers.

    temperature: divides the logits; 0 is greedy. None: 1.0 when top_k or top_p is given, else greedy.
    top_k: only the k most likely tokens; 0: all.
    top_p: only the most likely tokens that together have this probability.
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens seen before (Keskar et al.,
        "CTRL", 2019), in the prompt or the output; it holds for greedy choice too.
    seed: the same seed, prompts and options on the same machine give the same tokens. None: another seed each time.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            whole = name in ("top_k", "seed")
            missing = value is None and name in ("temperature", "seed")
            if not missing and (isinstance(value, bool) or not isinstance(value, Integral if whole else Real)):
                raise QwenModelError(f"{name} must be a {'whole ' * whole}number, not {value!r}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise QwenModelError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise QwenModelError(f"top_k must be at least 0 (0: all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QwenModelError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise QwenModelError(f"repetition_penalty must be a number above 0, not {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise QwenModelError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, after the repetition penalty."""
        if self.temperature is None:
            return self.top_k == 0 and self.top_p == 1.0
        return self.temperature == 0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        """Whether the choice is anything but the largest logit."""
        return not self.greedy or self.repetition_penalty != 1.0


class Choice(NamedTuple):
    """What of a request's options a captured step is made for; the others it reads on the device."""

    greedy: bool
    penalty: bool

    @classmethod
    def of(cls, options: SamplingOptions) -> Choice:
        """The kind of choice that these options ask for."""
        return cls(options.greedy, options.repetition_penalty != 1.0)


class KernelSettings(TypedDict):
    """What our kernel reads of a request's options on the device (csrc/kernels/sampling/sampling.h)."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int


def kernel_settings(options: SamplingOptions, vocab_size: int) -> KernelSettings:
    """The options as our kernel takes them, with a seed where none is given."""
    return KernelSettings(
        temperature=options.temperature or 1.0,  # 0 is greedy, and does not look at it
        top_k=min(options.top_k, vocab_size),
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=secrets.randbits(63) if options.seed is None else options.seed,
    )
