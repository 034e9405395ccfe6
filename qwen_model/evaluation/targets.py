"""Let a benchmark drive an engine and its original: both generate greedily, and no token ends generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..engine.session import Session
from ..interface.sampling import SamplingOptions
from .original import Original


class EngineTarget:
    """Implement `BatchTarget` with a session, without making text of the tokens; no batch reuses what another left."""

    def __init__(self, session: Session):
        config = dataclasses.replace(session.config, end_token_ids=())
        self._session = Session(config, session.scheduler)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, on_step: Callable[[], None]) -> None:
        """See `BatchTarget`."""
        self._session.scheduler.forget_prefixes()
        for event in self._session.stream(prompts, max_new_tokens=new_tokens, sampling=SamplingOptions()):
            if event.index == 0:  # the first event of each step
                on_step()


class OriginalTarget:
    """Implement `BatchTarget` with transformers."""

    def __init__(self, original: Original):
        self._original = original

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, on_step: Callable[[], None]) -> None:
        """See `BatchTarget`."""
        self._original.generate(prompts, new_tokens, on_step=on_step)
