"""Run the engine's process: one thread that owns the scheduler, between sockets to the HTTP processes."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ..common.errors import QwenModelError
from ..engine.scheduler import Event, Scheduler
from ..engine.sequences import Sequence
from ..engine.session import Session
from ..interface.device import FloatArray
from ..interface.sampling import SamplingOptions
from .grammar import GrammarCompiler, GrammarState
from .metrics import EngineMetrics
from .wire import REQUEST_DECODER, Add, Ask, Cancel, Failed, Frame, Frames, Score, Scored, Text, Token, framed

LOG = logging.getLogger(__name__)
READ_SIZE = 1 << 18
MOST_UNSENT = 1 << 24
"""Bytes that may wait for an HTTP process; beyond, no step is run until it has read of them."""
MOST_UNREAD_SECONDS = 10.0
"""An HTTP process that is so far behind, and has read nothing for so long, is given up."""


@dataclass
class _Peer:
    """Hold the connection to an HTTP process."""

    connection: socket.socket
    frames: Frames = field(default_factory=Frames)
    out: Frame = field(default_factory=Frame)
    unsent: bytearray = field(default_factory=bytearray)
    last_sent: float = field(default_factory=time.monotonic)
    sequences: dict[int, Sequence] = field(default_factory=dict)


@dataclass
class _Running:
    """Hold a sequence that was added, when that was, and when its last token came."""

    peer: _Peer
    id: int
    added: float
    last: float
    tokens: int = 0


@dataclass(frozen=True)
class _Scoring:
    """Hold a prompt whose log-probabilities are being computed, and when it was added."""

    peer: _Peer
    request: Score
    added: float


class EngineLoop:
    """Take requests from HTTP processes, run them with a scheduler, and send tokens back, until all have gone."""

    def __init__(self, session: Session, connections: Many[socket.socket], max_waiting: int):
        """Take the engine, the connections, and the most sequences that may wait for a slot."""
        self._scheduler: Scheduler = session.scheduler
        self._max_waiting = max_waiting
        self._metrics = EngineMetrics(session.config)
        self._compiler = _grammar_compiler(session)
        self._selector = selectors.DefaultSelector()
        self._running: dict[Sequence, _Running] = {}
        self._peers: list[_Peer] = []
        self._scoring: dict[Sequence, _Scoring] = {}
        for connection in connections:
            connection.setblocking(False)
            peer = _Peer(connection)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def run(self) -> None:
        """Serve until every HTTP process has closed its connection."""
        while self._peers:
            waits_to_send = any(peer.unsent for peer in self._peers)
            timeout = 0 if self._can_step() else 0.001 if waits_to_send else None
            for key, _ in self._selector.select(timeout):
                self._receive(key.data)
            if self._can_step():
                self._step()
            for peer in tuple(self._peers):
                self._send(peer)

    def _can_step(self) -> bool:
        """Tell whether there is work, and no HTTP process is so far behind that the engine waits for it.

        An HTTP process can be the slower one for long: with log-probabilities it writes much for each token.
        """
        return self._scheduler.has_work and all(len(peer.unsent) <= MOST_UNSENT for peer in self._peers)

    def _step(self) -> None:
        """Run one step; if the device fails, so do the requests that run, and the next ones begin anew."""
        start = time.perf_counter()
        try:
            events = self._scheduler.step()
        except QwenModelError as error:
            LOG.exception("a step failed: its requests are ended")
            for sequence in (*self._running, *self._scoring):
                self._fail(sequence, str(error))
            return
        self._report(events)
        self._metrics.step(time.perf_counter() - start)

    def _fail(self, sequence: Sequence, message: str) -> None:
        for peer in self._peers:
            for number, each in tuple(peer.sequences.items()):
                if each is sequence:
                    del peer.sequences[number]
                    peer.out.answers.append(Failed(number, 500, message))
        self._end(sequence, "error")

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        for content in peer.frames.push(data):
            request = REQUEST_DECODER.decode(content)
            if isinstance(request, Add):
                self._add(peer, request)
            elif isinstance(request, Cancel):
                self._cancel(peer, request.id, "stop" if request.stopped else "cancelled")
            elif isinstance(request, Ask):
                peer.out.answers.append(Text(request.id, self._metrics.text(self._scheduler)))
            else:
                self._add_score(peer, request)

    def _drop(self, peer: _Peer) -> None:
        """Forget an HTTP process that has gone, and end what it asked for."""
        self._selector.unregister(peer.connection)
        self._peers.remove(peer)
        for number in tuple(peer.sequences):
            self._cancel(peer, number, "cancelled")
        peer.connection.close()

    def _add(self, peer: _Peer, request: Add) -> None:
        if self._is_full(peer, request.id):
            return
        try:
            sequence = self._sequence(peer, request)
            self._scheduler.add(sequence)
        except QwenModelError as error:
            peer.out.answers.append(Failed(request.id, 400, str(error)))
            return
        peer.sequences[request.id] = sequence
        now = time.perf_counter()
        self._running[sequence] = _Running(peer, request.id, now, now)
        self._metrics.added(len(request.prompt))

    def _is_full(self, peer: _Peer, number: int) -> bool:
        """Tell whether too many sequences wait; the request is refused then."""
        if self._scheduler.num_waiting < self._max_waiting:
            return False
        self._metrics.refused.inc()
        message = f"{self._max_waiting} requests are waiting already: try again later"
        peer.out.answers.append(Failed(number, 429, message))
        return True

    def _sequence(self, peer: _Peer, request: Add) -> Sequence:
        return Sequence(
            request.prompt,
            request.max_new_tokens,
            _sampling(request.sampling),
            frozenset(request.end_token_ids),
            draws=request.draws,
            num_best=request.num_best,
            masker=None if request.grammar is None else self._grammar_state(request.grammar),
            salt=request.salt.encode(),
            parent=peer.sequences.get(request.parent),
        )

    def _grammar_state(self, grammar: str) -> GrammarState:
        if self._compiler is None:
            raise QwenModelError("structured output needs a tokenizer, and this engine has none")
        return self._compiler.compile(grammar)

    def _cancel(self, peer: _Peer, number: int, reason: str) -> None:
        sequence = peer.sequences.pop(number, None)
        if sequence is not None:
            self._scheduler.cancel(sequence)
            self._end(sequence, reason)

    def _report(self, events: list[Event]) -> None:
        """Put the tokens of a step into the frames of those who asked for them."""
        now = time.perf_counter()
        first: list[float] = []  # seconds that the requests waited
        between: list[float] = []
        for event in events:
            if event.sequence in self._scoring:
                self._report_score(event.sequence)
            running = self._running.get(event.sequence)
            if running is None:  # cancelled meanwhile
                continue
            if event.finish_reason == "error":
                message = event.sequence.error or "the logits of this request are not finite"
                running.peer.out.answers.append(Failed(running.id, 500, str(message)))
            else:
                (between if running.tokens else first).append(now - running.last)
                running.peer.out.tokens.append(_token(running, event))
                running.last = now
                running.tokens += 1
            if event.finish_reason is not None:
                running.peer.sequences.pop(running.id, None)
                self._end(event.sequence, event.finish_reason)
        self._metrics.tokens(first, between)

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Forget a sequence, and count it."""
        now = time.perf_counter()
        if (scoring := self._scoring.pop(sequence, None)) is not None:
            self._metrics.ended(reason, 0, now - scoring.added, scoring.request.outputs)
        else:
            running = self._running.pop(sequence)
            self._metrics.ended(reason, running.tokens, now - running.added)

    def _add_score(self, peer: _Peer, request: Score) -> None:
        if self._is_full(peer, request.id):
            return
        now = time.perf_counter()
        if request.num_best is None:
            self._metrics.added(len(request.prompt), request.outputs)
            self._metrics.ended("length", 0, time.perf_counter() - now, request.outputs)
            peer.out.answers.append(Scored(request.id, [], []))
            return
        sequence = Sequence(request.prompt, 0, logit_rows=len(request.prompt))
        try:
            self._scheduler.add(sequence)
        except QwenModelError as error:
            peer.out.answers.append(Failed(request.id, 400, str(error)))
            return
        peer.sequences[request.id] = sequence
        self._scoring[sequence] = _Scoring(peer, request, now)
        self._metrics.added(len(request.prompt), request.outputs)

    def _report_score(self, sequence: Sequence) -> None:
        scoring = self._scoring[sequence]
        scoring.peer.sequences.pop(scoring.request.id, None)
        failed = sequence.finish_reason == "error"
        self._end(sequence, "error" if failed else "length")
        if failed:
            scoring.peer.out.answers.append(Failed(scoring.request.id, 500, str(sequence.error)))
            return
        scoring.peer.out.answers.append(scored(scoring.request, sequence.logits))

    def _send(self, peer: _Peer) -> None:
        """Send what there is without waiting; drop an HTTP process that does not read."""
        if peer.out.tokens or peer.out.answers:
            peer.unsent += framed(peer.out)
            peer.out = Frame()
        if not peer.unsent:
            return
        try:
            sent = peer.connection.send(peer.unsent)
            del peer.unsent[:sent]
            peer.last_sent = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self._drop(peer)
            return
        if len(peer.unsent) > MOST_UNSENT and time.monotonic() - peer.last_sent > MOST_UNREAD_SECONDS:
            LOG.error("an HTTP process does not read: its requests are ended")
            self._drop(peer)


def _grammar_compiler(session: Session) -> GrammarCompiler | None:
    """Return what compiles grammars for a model; None if it has no tokenizer. Making it takes a second."""
    if session.tokenizer is None:
        return None
    ends = (*session.config.end_token_ids, *session.tokenizer.chat_end_token_ids())
    return GrammarCompiler(session.tokenizer, session.config.model.vocab_size, ends)


def scored(request: Score, parts: Many[FloatArray]) -> Scored:
    """Return the log-probabilities of a prompt's tokens but the first; `parts` are the logits after all its tokens."""
    answer = Scored(request.id, [], [])
    for row, token in zip(chain.from_iterable(parts), request.prompt[1:], strict=False):  # nothing follows the last
        logprobs = row - row.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        count = min(request.num_best or 0, len(row))
        best = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, int)
        best = best[np.argsort(-logprobs[best], kind="stable")]
        answer.logprobs.append(float(logprobs[token]))
        answer.best.append(list(zip(best.tolist(), logprobs[best].tolist(), strict=True)))
    return answer


def _sampling(fields: dict[str, Any]) -> SamplingOptions:
    """Return the options of a request, whose biases have token ids as text."""
    biases = {int(token): value for token, value in (fields.get("logit_bias") or {}).items()}
    return SamplingOptions(**{**fields, "logit_bias": biases})


def _token(running: _Running, event: Event) -> Token:
    reason = event.finish_reason
    token = Token(running.id, event.token, reason if reason == "stop" or reason == "length" else None)
    if event.logprob is not None:
        token.logprob = event.logprob.logprob
        token.best = event.logprob.best
    if running.tokens == 0:
        token.cached = event.sequence.num_cached
    return token
