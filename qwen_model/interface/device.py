"""Define what the scheduler asks of a loaded engine: one described step of the network, and a choice of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .engine_config import GemmKernels
from .sampling import SamplingOptions

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
TokenMask = npt.NDArray[np.uint32]
"""The tokens that may be chosen: uint32 [(vocab_size + 31) // 32], bit i % 32 of word i // 32 for token i."""

NO_TOKEN = -1
"""Stands for a chosen token where the logits hold NaN or +infinity, or are all -infinity."""
LAST_TOKEN = -1
"""Stands in `Batch.tokens` for the token that the device chose last for the sequence, which the host need not know."""
UNUSED_PAGE = 0
"""The page that padded rows write to, and that nobody reads: no sequence may have it."""


@dataclass(frozen=True)
class Batch:
    """Describe one step: the new tokens of some sequences, packed one sequence after the other.

    The cache is divided into pages of `Device.page_size` positions; a sequence's positions p are in its page
    p // page_size. The pages must hold past_lengths + lengths positions.
    """

    tokens: Int32Array  # [sum of lengths]: token ids or LAST_TOKEN
    slots: Int32Array  # [sequences]: where the device keeps the state of each sequence, see `Device.start`
    lengths: Int32Array  # [sequences]: new tokens of each, at least 1
    past_lengths: Int32Array  # [sequences]: positions in the cache before these
    prompt_lengths: Int32Array  # [sequences]: tokens of the whole prompt, on which some rotary embeddings depend
    pages: Int32Array  # [sequences, most pages of one]: page numbers in the order of positions, UNUSED_PAGE behind them
    chooses: npt.NDArray[np.bool_]  # [sequences]: whether the token after the last new one is chosen
    num_decoding: int = 0  # beside prompts: the first so many sequences have one new token and choose; see `mixes`

    @property
    def is_decode(self) -> bool:
        """Tell whether every sequence has one new token, and one is chosen for each: the step that is captured."""
        return bool((self.lengths == 1).all() and self.chooses.all())


@dataclass(frozen=True)
class Start:
    """Describe a sequence that begins in a slot, or comes back to one after its pages were taken.

    draws: the number of the sequence among those of one request, so that they draw differently from one seed.
    prompt, output: the tokens that penalties count as seen; the number of output tokens is the number of past draws.
    """

    slot: int
    sampling: SamplingOptions
    draws: int
    prompt: Sequence[int]
    output: Sequence[int] = ()


@dataclass(frozen=True)
class Chosen:
    """Hold what was chosen for the sequences of a step that choose, in their order."""

    tokens: Int64Array  # [n]: token ids, NO_TOKEN where logits are not finite
    logprobs: FloatArray | None = None  # [n]: of the chosen token, of the softmax of the network's own logits
    best_tokens: Int64Array | None = None  # [n, k]: the most likely tokens, best first, of equal ones the lowest first
    best_logprobs: FloatArray | None = None  # [n, k]


class PendingChoice(Protocol):
    """Hold the choice of one step, which the device may still be computing."""

    def wait(self) -> Chosen:
        """Block until the tokens are computed and return them."""


class Device(Protocol):
    """Run a loaded engine: the state of `max_sequences` sequences, and a cache of `num_pages` pages.

    Steps are run in the order of the calls. No call waits for an earlier step, unless it says so. A device is not for
    use by several threads at a time.
    """

    max_sequences: int
    """The number of slots, and the most sequences of a step."""

    max_tokens: int
    """The most tokens of a step."""

    max_logit_rows: int
    """The most rows of logits of a step, at least `max_sequences`."""

    page_size: int
    """Positions of a page."""

    num_pages: int
    """Pages of the cache, UNUSED_PAGE among them."""

    runs_ahead: bool
    """Whether calls return before the step is done: callers should then start the next step before they wait."""

    mixes: bool
    """Whether one step can have decode tokens and, behind them, prompts: see `Batch.num_decoding`."""

    gemm_kernels: GemmKernels | None
    """The kernels of this project that compute the linear layers; None: they are not used."""

    def prepare(self, num_sequences: int) -> None:
        """Do the one-time work for decode steps of up to that many sequences, such as capturing CUDA graphs."""

    def start(self, sequences: Sequence[Start]) -> None:
        """Set the state of slots: how their tokens are chosen, and what was seen."""

    def forward(self, batch: Batch) -> None:
        """Run the network on a batch; its keys and values are in the cache for all later calls."""

    def choose(self, masks: Mapping[int, TokenMask] | None = None, num_best: int | None = None) -> PendingChoice:
        """Choose the next token of each sequence of the last `forward` that chooses.

        masks: allowed tokens, by slot; sequences of other slots may choose any.
        num_best: also return log-probabilities, and those of this many most likely tokens; None: tokens alone.
        """

    def logits(self, batch: Batch, rows: Int32Array) -> FloatArray:
        """Run the network as `forward`, wait, and return the logits after the tokens at `rows` of the packed tokens.

        Returns: float32 [len(rows), vocab_size]; there are at most `max_logit_rows` rows.
        """

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, given as (source, target), all layers of each; no target is the source of another pair."""
