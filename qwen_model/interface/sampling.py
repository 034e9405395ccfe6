"""Define and check the options by which the next token is chosen; each back end chooses on its device."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

from ..checkpoints.json_values import LARGEST_NUMBER, SMALLEST_NUMBER
from ..common.errors import QwenModelError, shown


@dataclass(frozen=True)
class SamplingOptions:
    """Say how tokens are chosen: greedily, unless temperature, top_k or top_p is given.

    They are applied in this order, as in transformers.

    temperature: divides the logits; 0 is greedy. None: 1.0 if top_k or top_p is given, else greedy.
    top_k: draw from the k most likely tokens; 0: from all.
    top_p: draw from the most likely tokens that together have this probability; 1: from all.
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens seen before (Keskar et al.,
        "CTRL", 2019), in the prompt or the output; it applies to greedy choice, too.
    seed: the same seed, prompts and options on the same machine give the same tokens. None: another seed each time.

    Raises:
        QwenModelError: an option is of a wrong type or out of its range.
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
                raise QwenModelError(f"{name} must be {'an integer' if whole else 'a number'}, not {shown(value)}")
            if not missing and not whole and isinstance(value, Integral) and abs(int(value)) >= 2**100:
                raise QwenModelError(f"{name} must be below 2**100, not {shown(value)}")
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

    @property
    def greedy(self) -> bool:
        """Tell whether the most likely token, after the repetition penalty, is taken."""
        if self.temperature is None:
            return self.top_k == 0 and self.top_p == 1.0
        return self.temperature == 0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        """Tell whether another token than that of the largest logit may be chosen."""
        return not self.greedy or self.repetition_penalty != 1.0


@dataclass(frozen=True)
class SamplingDefaults:
    """Hold how a checkpoint's authors choose tokens, as its `generation_config.json` says.

    do_sample: whether tokens are drawn. If not, temperature, top_k and top_p apply only where a user gives one of them.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise QwenModelError(f"do_sample must be true or false, not {self.do_sample!r}")
        if self.temperature is None:
            raise QwenModelError("temperature must be a number, not None")
        SamplingOptions(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

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
    ) -> SamplingOptions:
        """Return the options of a request that sets these and leaves the others (None) to the checkpoint.

        Tokens are drawn if the checkpoint does or if temperature, top_k or top_p is given; temperature 0 is greedy.
        """
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        if not self.do_sample and temperature is None and top_k is None and top_p is None:
            return SamplingOptions(repetition_penalty=penalty, seed=seed)
        return SamplingOptions(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            repetition_penalty=penalty,
            seed=seed,
        )


class Choice(NamedTuple):
    """Hold the options that a captured step depends on; it reads the others on the device."""

    greedy: bool
    penalty: bool

    @classmethod
    def of(cls, options: SamplingOptions) -> Choice:
        """Return the choice for these options."""
        return cls(options.greedy, options.repetition_penalty != 1.0)


class KernelSettings(TypedDict):
    """Hold the options that our kernel reads on the device (csrc/kernels/sampling/sampling.h)."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int


def kernel_settings(options: SamplingOptions, vocab_size: int) -> KernelSettings:
    """Return the options as our kernel takes them, with a random seed if none is given."""
    return KernelSettings(
        temperature=options.temperature or 1.0,  # 0 is greedy: the kernel does not use it
        top_k=min(options.top_k, vocab_size),
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=secrets.randbits(63) if options.seed is None else options.seed,
    )
