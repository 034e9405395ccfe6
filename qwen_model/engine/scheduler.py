"""Decide which sequences a device runs next: they come and go between steps, and share one paged cache.

A step has one token of every running sequence, and prompts behind these, in chunks where they are long: so the weights
are read once for both. On a device that cannot mix them decode steps take turns with steps of prompts. Sequences begin
in the order in which they came. When the pages run out, the youngest sequence gives up its own, waits, and is computed
again from its tokens.

Where the device runs ahead, a step is launched before the tokens of the one before are read. So that a sequence has
ended is found one step late; its slot and pages are kept until no launched step uses them.
"""

from __future__ import annotations

import dataclasses
import heapq
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from ..common.errors import QwenModelError
from ..common.turn_lock import TurnLock
from ..interface.device import NO_TOKEN, Batch, Chosen, Device, Int32Array, PendingChoice, Start, TokenMask
from .pages import PagePool, extend_names
from .results import TokenLogprob
from .sequences import EndReason, Event, Sequence
from .slots import Slots

CHUNK_TOKENS = 512
"""Tokens of a step of prompts while others decode: it takes a large model about as long as one or two decode steps."""
MIXED_TOKENS = 1024
"""Tokens of a step of both: the GEMMs of a large model are compute-bound from about as many on."""
LEAST_SHARE = 4
"""A step of both has room for at least a fourth of the tokens of prompts that it has without decode tokens."""
PATIENCE = 8
"""The most steps of decoding for which a free slot is kept until more are free."""


@dataclass(frozen=True)
class _Launched:
    """Hold a step that the device was given."""

    number: int
    prompt_share: float  # see `Scheduler.prompt_share`
    sequences: list[Sequence]  # those that choose
    choice: PendingChoice | None  # None: there are none


class Scheduler:
    """Run sequences on a device, which has one scheduler. Several threads that use it must hold `lock`."""

    def __init__(
        self,
        device: Device,
        *,
        deterministic: bool = False,
        chunk_tokens: int | None = None,
        stretch: Callable[[int], int] = lambda prompt_length: 1,
    ):
        """Take over a device, with all its slots and pages.

        deterministic: what a sequence gives does not depend on the others: it begins when there are pages for its
            longest output, so that it is never computed again; it shares pages of prompts only; and its prompt is
            divided as it would be alone. The device must do its part.
        chunk_tokens: the most tokens of a step with prompts while other sequences wait for their next token; where
            these are very many, prompts have a fourth as many beside them. None: MIXED_TOKENS where steps have both,
            else CHUNK_TOKENS.
        stretch: of the rotary embedding for a prompt's length, see `rotary_stretch`; prefixes are shared where equal.
        """
        if device.max_tokens < device.max_sequences:
            raise ValueError(f"max_tokens {device.max_tokens} is less than max_sequences {device.max_sequences}")
        self.device = device
        self.lock = TurnLock()
        self.deterministic = deterministic
        self._stretch = stretch
        self._mixes = device.mixes and not deterministic
        default = MIXED_TOKENS if self._mixes else CHUNK_TOKENS
        self.chunk_tokens = min(chunk_tokens or default, device.max_tokens)
        self.pool = PagePool(device.num_pages, device.page_size)
        self.prompt_share = 0.0
        """The share of the tokens of the step that was read last which were of prompts."""
        self._slots = Slots(device.max_sequences)
        self._numbers, self._steps = count(), count(1)
        self._waiting: list[tuple[tuple[int, ...], Sequence]] = []  # a heap; what has ended is dropped when it is met
        self._patient = False
        self._filling = False  # free slots are being given to those that wait
        self._kept_free = 0  # steps for which there were free slots, but too few
        self._prefilling: list[Sequence] = []  # have slot and pages; a part of their tokens is not in the cache
        self._starts: list[Start] = []  # of slots, before the next step
        self._in_flight: deque[_Launched] = deque()
        self._decodes_next = False  # prompts had the last step for themselves
        self._last_read = 0  # number of the step that was read last
        self._ended: list[Sequence] = []  # have a slot yet
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Tell whether `step` has anything to do; sequences that are held wait for `advance`."""
        return bool(
            self._in_flight
            or self._prefilling
            or self._ended
            or self._first_waiting() is not None
            or self._slots.decoding.any()
        )

    @property
    def num_running(self) -> int:
        """Return the number of sequences that have a slot."""
        return self.device.max_sequences - len(self._slots.free)

    @property
    def num_waiting(self) -> int:
        """Return the number of sequences that wait for a slot or for pages."""
        return sum(sequence.finish_reason is None for _, sequence in self._waiting)

    def check(self, sequence: Sequence, name: str = "the prompt") -> None:
        """Raise QwenModelError if the cache is too small for a sequence even when it is alone."""
        needed, pages = self._longest(sequence), self.pool.num_pages - 1
        if needed > pages:
            raise QwenModelError(
                f"{name} of {len(sequence.prompt)} tokens and {sequence.max_new_tokens} new ones need {needed} pages "
                f"of the key-value cache, which has {pages} of {self.pool.page_size} tokens: ask for fewer tokens, or "
                "give the cache more memory (--gpu-memory-utilization)"
            )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn.

        Raises:
            QwenModelError: see `check`.
        """
        self.check(sequence)
        if sequence.sampling.seed is None and not sequence.sampling.greedy:  # what comes back draws as before
            sequence.sampling = dataclasses.replace(sequence.sampling, seed=secrets.randbits(63))
        number = next(self._numbers)
        sequence.order = (number if sequence.parent is None else sequence.parent.order[0], number)
        self._wait(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence, if it has not ended: no event comes any more, and the next steps free what it has."""
        if sequence.finish_reason is None:
            self._end(sequence, "cancelled")

    def forget_prefixes(self) -> None:
        """Let sequences that are added from now on share nothing that is in the cache: measurements need that."""
        self.pool.forget()

    def step(self, patient: bool = False) -> list[Event]:
        """Launch the next step, or two if the device runs ahead; wait for the oldest and return its tokens.

        There are none after a step of prompts that are not complete. If the device fails, all sequences are cancelled.

        patient: nobody looks at a token before all are there, so that steps of prompts may be long.
        """
        self._patient = patient
        events: list[Event] = []
        try:
            while len(self._in_flight) <= int(self.device.runs_ahead) and self._launch(events):
                pass
            if self._in_flight:
                self._read(events)
        except BaseException:
            self._forget_everything()
            raise
        return events

    def advance(self, rows: list[Sequence], sources: list[int], tokens: list[int]) -> None:
        """Let held sequences go on: row i becomes what row `sources[i]` was, followed by `tokens[i]`.

        The rows have one prompt; new ones are added by it. Pages are shared, but for a last one that is not full: it is
        copied. A row that has no slot, or whose source has no pages, waits to be computed from its tokens.
        """
        size = self.pool.page_size
        found = [(row.tokens, row.names, row.pages, self._past(row)) for row in rows]
        heirs: dict[int, Sequence] = {}  # the row that goes on in the last page of a source
        shared = []
        for row, source in zip(rows, sources, strict=True):
            _, _, pages, past = found[source]
            shared.append(pages if heirs.setdefault(source, row) is row else pages[: past // size])
            self.pool.share(shared[-1])
        for _, _, pages, _ in found:
            self.pool.release(pages)
        copies, displaced = [], []
        for row, source, pages, token in zip(rows, sources, shared, tokens, strict=True):
            source_tokens, names, source_pages, past = found[source]
            row.tokens, row.names, row.pages = [*source_tokens, token], list(names), pages
            row.parent = None if heirs[source] is row else heirs[source]
            row.order = row.order or (rows[0].order[0], next(self._numbers))
            copied = row.parent is not None and past % size > 0
            if row.slot is None or not source_pages or (copied and not self.pool.num_free):
                displaced.append(row)
                continue
            if copied:
                pages = pages + self.pool.allocate(1)
                copies.append((source_pages[past // size], pages[-1]))
            self._slots.place(row, row.slot, pages, past)
            self._slots.decode_last_token(row)
        if copies:
            self.device.copy_pages(copies)
        for row in displaced:  # their pages may be sources of copies
            self._free(row)
            self._wait(row)

    # Sequences wait, have a slot and pages, or have ended.

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].finish_reason is not None:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _past(self, sequence: Sequence) -> int:
        """Return how many positions of a sequence launched steps have written."""
        return 0 if sequence.slot is None else int(self._slots.past[sequence.slot])

    def _longest(self, sequence: Sequence) -> int:
        """Return the pages of a sequence at its longest; its last token is never processed."""
        return self.pool.pages_of(len(sequence.prompt) + max(sequence.max_new_tokens - 1, 0))

    def _begin(self, sequence: Sequence, pages: list[int], past: int) -> None:
        """Give pages and a free slot to the first sequence that waits."""
        heapq.heappop(self._waiting)
        slot = heapq.heappop(self._slots.free)
        self._slots.place(sequence, slot, pages, past)
        if not sequence.logit_rows:
            self._starts.append(Start(slot, sequence.sampling, sequence.draws, sequence.prompt, sequence.output))

    def _fork(self) -> None:
        """Begin those that wait and continue what another holds: they share full pages, and copy the last."""
        size = self.pool.page_size
        sources: dict[int, int] = {}  # of each copy
        while (sequence := self._first_waiting()) is not None and (parent := self._forked(sequence)) is not None:
            full, filled = divmod(len(sequence.tokens) - 1, size)
            own = self.pool.allocate(1)
            self.pool.share(parent.pages[:full])
            if filled:
                sources[own[0]] = sources.get(parent.pages[full], parent.pages[full])  # the parent's may be a copy, too
            self._begin(sequence, parent.pages[:full] + own, full * size + filled)
            sequence.num_cached = full * size + filled
            self._slots.decode_last_token(sequence)
        if sources:
            self.device.copy_pages([(source, copy) for copy, source in sources.items()])

    def _forked(self, sequence: Sequence) -> Sequence | None:
        """Return the parent of a sequence if all tokens but its last are in the parent's pages, and there is room."""
        parent, past = sequence.parent, len(sequence.tokens) - 1
        if parent is None or self.deterministic or self._past(parent) < past or sequence.logit_rows:
            return None
        room = self._slots.free and self.pool.num_free > self.num_running
        return parent if room and parent.tokens[:past] == sequence.tokens[:past] else None

    def _admit(self) -> Sequence | None:
        """Begin the first sequence that waits, if it can have a slot and pages for all its tokens so far."""
        sequence = self._first_waiting()
        if sequence is None or not self._slots.free or sequence.parent in self._prefilling:
            return None
        size, tokens = self.pool.page_size, len(sequence.tokens)
        self._extend_names(sequence)
        shared = self.pool.find(sequence.names[: (tokens - max(1, sequence.logit_rows)) // size])
        self.pool.share(shared)
        needed = (self._longest(sequence) if self.deterministic else self.pool.pages_of(tokens)) - len(shared)
        spare = 0 if self.deterministic else self.num_running  # a next page of each, or it would soon be preempted
        if needed + spare > self.pool.num_free:
            self.pool.release(shared)
            return None
        self._begin(sequence, shared + self.pool.allocate(needed), len(shared) * size)
        sequence.num_cached = len(shared) * size
        self._prefilling.append(sequence)
        return sequence

    def _extend_names(self, sequence: Sequence) -> None:
        salt = sequence.salt + b"/%d" % self._stretch(len(sequence.prompt))
        extend_names(sequence.names, sequence.tokens, self.pool.page_size, salt)

    def _name_pages(self, sequence: Sequence) -> None:
        """Let other sequences find the full pages that launched steps have written."""
        written = self._past(sequence)
        if self.deterministic:
            written = min(written, len(sequence.prompt))
        if written // self.pool.page_size > sequence.num_named:
            self._extend_names(sequence)
            end = min(written // self.pool.page_size, len(sequence.names))
            for index in range(sequence.num_named, end):
                self.pool.name(sequence.pages[index], sequence.names[index])
            sequence.num_named = end

    def _free(self, sequence: Sequence) -> None:
        """Free slot and pages of a sequence."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        self._slots.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Free slot and pages; until these are given out again, others can find the full ones."""
        if sequence.slot is not None:
            self._name_pages(sequence)
            self._free(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)

    def _preempt_youngest(self) -> None:
        """Take slot and pages from the sequence that came last; it waits, or is held, to be computed again."""
        youngest = self._slots.youngest()
        held = youngest.hold and youngest not in self._prefilling and not self._slots.decoding[youngest.slot]
        self._leave(youngest)
        youngest.logits.clear()  # all are computed again
        self.num_preemptions += 1
        if not held:
            self._wait(youngest)

    def _end(self, sequence: Sequence, reason: EndReason) -> None:
        """Take a sequence out of all later steps."""
        sequence.finish_reason = reason
        if sequence.slot is not None:
            self._slots.decoding[sequence.slot] = False
            self._ended.append(sequence)
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)

    def _free_ended(self) -> None:
        """Free what ended sequences have that no launched step uses any more."""
        if self._ended:
            used = [each for each in self._ended if self._slots.last_step[each.slot] > self._last_read]
            for sequence in self._ended:
                if sequence not in used:
                    self._leave(sequence)
            self._ended = used

    def _forget_everything(self) -> None:
        """Cancel all sequences, and begin with an empty cache."""
        for sequence in (*filter(None, self._slots.sequences), *(each for _, each in self._waiting)):
            sequence.finish_reason = sequence.finish_reason or "cancelled"
            sequence.slot, sequence.pages = None, []
        self.pool = PagePool(self.device.num_pages, self.device.page_size)
        self._slots = Slots(self.device.max_sequences)
        for each in (self._waiting, self._prefilling, self._starts, self._in_flight, self._ended):
            each.clear()

    # Steps are launched and read.

    def _launch(self, events: list[Event]) -> bool:
        """Launch a step, of decode tokens and prompts or of both in turns; return whether there was any."""
        if self._ended and not self._prefilling and not self._slots.decoding.any():
            self._read_all(events)  # what is in flight serves nobody, and keeps slots from those that wait
        self._free_ended()
        self._fork()
        slots = self._decode_slots(events)
        own_turn = self._decodes_next and len(slots) > 0
        parts = [] if own_turn else self._prompt_parts(len(slots))
        if parts and len(slots) and not self._joins(parts, len(slots)):
            slots = slots[:0]
            self._decodes_next = True
        else:
            self._decodes_next = not self._mixes and bool(parts)
        if parts or len(slots):
            self._launch_step(slots, parts, events)
            return True
        if self._in_flight or self._first_waiting() is None:
            return False
        self._preempt_youngest()  # all that have pages are held, perhaps until one that waits has been computed
        return self._launch(events)

    def _decode_slots(self, events: list[Event]) -> Int32Array:
        """Return the slots of a decode step, with pages for their next positions; preempt others where these lack."""
        while True:
            slots = np.flatnonzero(self._slots.decoding).astype(np.int32)
            full = slots[self._slots.past[slots] >= self._slots.num_pages[slots] * self.pool.page_size]
            if len(full) <= self.pool.num_free:
                break
            if self._in_flight:  # some may have ended
                self._read_all(events)
            else:
                self._preempt_youngest()
        for sequence in self._slots.at(full):
            self._name_pages(sequence)
            self._slots.add_pages(sequence, self.pool.allocate(1))
        return slots

    def _launch_step(self, slots: Int32Array, parts: list[tuple[Sequence, int]], events: list[Event]) -> None:
        """Launch a step of one token of each slot and of parts of prompts, or of prompts that ask for logits."""
        batch = self._slots.batch(slots, parts)
        done = [each for each, length in parts if self._past(each) + length == len(each.tokens)]
        self._prefilling = [each for each in self._prefilling if each not in done]
        self._start_slots()
        scoring = _scores(parts)
        if scoring:
            self._score(batch, parts)
        else:
            self.device.forward(batch)
        self._choose(batch, [] if scoring else self._slots.at(slots) + done, 1 - len(slots) / len(batch.tokens), events)
        for sequence, _ in parts:
            if sequence.slot is not None:
                self._name_pages(sequence)
        for sequence in done if scoring else ():
            self._end(sequence, "length")
            events.append(Event(sequence, NO_TOKEN, "length", None))

    def _joins(self, parts: list[tuple[Sequence, int]], num_decoding: int) -> bool:
        """Tell whether parts of prompts have a step together with so many decode tokens."""
        return self._room_beside(num_decoding) > 0 and not _scores(parts)

    def _room_beside(self, num_decoding: int) -> int:
        """Return the most tokens of prompts of a step with so many decode tokens; 0: they have steps of their own."""
        most = self.device.max_tokens if self._patient else self.chunk_tokens
        least = max(1, self.chunk_tokens // LEAST_SHARE)
        room = min(max(most - num_decoding, least), self.device.max_tokens - num_decoding)
        return room if self._mixes and room >= least else 0

    def _prompt_parts(self, num_decoding: int) -> list[tuple[Sequence, int]]:
        """Return sequences with the number of their tokens that a step processes next, beside or after decoding."""
        alone = self.chunk_tokens if num_decoding and not self._patient else self.device.max_tokens
        budget = (self._room_beside(num_decoding) if num_decoding else 0) or alone
        rows = self.device.max_logit_rows
        self._filling = self._fills(num_decoding > 0)
        parts: list[tuple[Sequence, int]] = []
        for sequence in chain(list(self._prefilling), iter(self._admit, None) if self._filling else ()):
            past = self._past(sequence)
            length = len(sequence.tokens) - past
            if self.deterministic:
                length = min(length, self.chunk_tokens - past % self.chunk_tokens)
            if sequence.logit_rows:
                before = max(len(sequence.tokens) - sequence.logit_rows - past, 0)  # tokens whose logits nobody wants
                length = min(length, before + rows)
                rows -= max(length - before, 0)
            if parts and bool(sequence.logit_rows) != bool(parts[0][0].logit_rows):
                break
            if length > budget and self.deterministic:
                break
            length = min(length, budget)
            if length:
                parts.append((sequence, length))
            budget -= length
            if not budget or not rows:
                break
        self._filling = self._filling and len(self._slots.free) > 0
        return parts

    def _fills(self, decoding: bool) -> bool:
        """Tell whether free slots are given to those that wait.

        A step of a few prompts takes as long as one of many. So where slots are scarce and others decode, free ones are
        kept until they are a sixteenth of all, or for some steps.
        """
        free = len(self._slots.free)
        enough = min(len(self._waiting), max(1, self.device.max_sequences // 16))
        self._kept_free = self._kept_free + 1 if 0 < free < enough else 0
        filling = (self._filling and bool(self._waiting)) or not decoding or free >= enough
        return filling or self._kept_free > PATIENCE

    def _start_slots(self) -> None:
        if self._starts:
            self.device.start(self._starts)
            self._starts = []

    def _score(self, batch: Batch, parts: list[tuple[Sequence, int]]) -> None:
        """Run a step of prompts, and give each sequence the logits that it asks for."""
        counts = [
            min(length, max(0, self._past(each) + length - (len(each.tokens) - each.logit_rows)))
            for each, length in parts
        ]
        ends = np.cumsum(batch.lengths)
        rows = [np.arange(end - wanted, end, dtype=np.int32) for end, wanted in zip(ends, counts, strict=True)]
        if not any(counts):
            self.device.forward(batch)
            return
        logits = self.device.logits(batch, np.concatenate(rows))
        for (sequence, _), found in zip(parts, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            if len(found):
                sequence.logits.append(found)

    def _choose(self, batch: Batch, sequences: list[Sequence], prompt_share: float, events: list[Event]) -> None:
        """Let the given sequences of the step that the network has just begun choose, and keep the step to be read."""
        number = next(self._steps)
        self._slots.advance(batch, number)
        choice = None
        if sequences:
            slots = batch.slots[batch.chooses]
            masks = {}
            if self._slots.masked[slots].any():
                self._read_all(events)  # a mask depends on the token before
                masks = self._masks(sequences, events)
            num_best = int(self._slots.num_best[slots].max())
            choice = self.device.choose(masks, None if num_best < 0 else num_best)
        self._in_flight.append(_Launched(number, prompt_share, sequences, choice))

    def _masks(self, sequences: list[Sequence], events: list[Event]) -> dict[int, TokenMask]:
        """Return the masks of those that have one, by slot. What fails to make one ends."""
        masks = {}
        for sequence in sequences:
            if sequence.masker is None or sequence.finish_reason is not None or sequence.slot is None:
                continue
            try:
                mask = sequence.masker.allowed()
            except Exception as error:
                sequence.error = error
                self._end(sequence, "error")
                events.append(Event(sequence, NO_TOKEN, "error", None))
                continue
            if mask is not None:
                masks[sequence.slot] = mask
        return masks

    def _read_all(self, events: list[Event]) -> None:
        while self._in_flight:
            self._read(events)

    def _read(self, events: list[Event]) -> None:
        """Wait for the tokens of the oldest step that was launched, and append them."""
        step = self._in_flight.popleft()
        if step.choice is not None:
            chosen = step.choice.wait()
            for row, (sequence, token) in enumerate(zip(step.sequences, chosen.tokens.tolist(), strict=True)):
                if sequence.finish_reason is None:  # None: found before this step was launched, or since
                    reason = self._take(sequence, token)
                    logprob = None if sequence.num_best is None else _logprob(chosen, row, sequence.num_best)
                    events.append(Event(sequence, token, reason, logprob))
        self._last_read, self.prompt_share = step.number, step.prompt_share
        self._free_ended()

    def _take(self, sequence: Sequence, token: int) -> EndReason | None:
        """Append a token to a sequence; return why it ends, if it does."""
        reason: EndReason | None = None
        if token == NO_TOKEN:
            reason = "error"
        elif sequence.hold:
            return None
        else:
            sequence.tokens.append(token)
            if token in sequence.end_token_ids:
                reason = "stop"
            elif len(sequence.tokens) >= sequence.max_length:
                reason = "length"
            elif sequence.masker is not None:
                try:
                    sequence.masker.accept(token)
                except Exception as error:
                    sequence.error, reason = error, "error"
        if reason is not None:
            self._end(sequence, reason)
        return reason


def _scores(parts: list[tuple[Sequence, int]]) -> bool:
    """Tell whether parts of prompts are of sequences that ask for logits: a step has such or others."""
    return bool(parts) and parts[0][0].logit_rows > 0


def _logprob(chosen: Chosen, row: int, num_best: int) -> TokenLogprob:
    """Return what was asked for of a row of a step's log-probabilities; a step may have computed more."""
    if chosen.logprobs is None or chosen.best_tokens is None or chosen.best_logprobs is None:
        raise RuntimeError("the device returned no log-probabilities")
    tokens, logprobs = chosen.best_tokens[row, :num_best].tolist(), chosen.best_logprobs[row, :num_best].tolist()
    return TokenLogprob(float(chosen.logprobs[row]), list(zip(tokens, logprobs, strict=True)))
