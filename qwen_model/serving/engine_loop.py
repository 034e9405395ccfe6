"""Run the engine's process: one thread that owns the scheduler, between sockets to the HTTP processes."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np

from ..common.errors import QwenModelError
from ..engine.scheduler import Event, Scheduler
from ..engine.sequences import Sequence
from ..engine.session import Session
from ..interface.sampling import SamplingOptions
from .grammar import GrammarCompiler, GrammarState
from .metrics import EngineMetrics
from .wire import REQUEST_DECODER, Add, Ask, Cancel, Failed, Frame, Frames, Score, Scored, Text, Token, framed

LOG = logging.getLogger(__name__)
READ_SIZE = 1 << 18
MOST_UNSENT = 1 << 26  # bytes to an HTTP process that does not read


@dataclass
class _Peer:
    """Hold the connection to an HTTP process."""

    connection: socket.socket
    frames: Frames = field(default_factory=Frames)
    out: Frame = field(default_factory=lambda: Frame([], []))
    unsent: bytearray = field(default_factory=bytearray)
    sequences: dict[int, Sequence] = field(default_factory=dict)


@dataclass
class _Running:
    """Hold a sequence that was added, and when."""

    peer: _Peer
    id: int
    added: float
    last: float = 0.0
    tokens: int = 0


class EngineLoop:
    """Take requests from HTTP processes, run them with a scheduler, and send tokens back, until all have gone."""

    def __init__(self, session: Session, connections: Many[socket.socket], max_waiting: int):
        """Take the engine, the connections, and the most sequences that may wait for a slot."""
        self._session = session
        self._scheduler: Scheduler = session.scheduler
        self._max_waiting = max_waiting
        self._metrics = EngineMetrics(session.config)
        self._compiler: GrammarCompiler | None = None
        self._selector = selectors.DefaultSelector()
        self._running: dict[Sequence, _Running] = {}
        self._peers: list[_Peer] = []
        self._scores: list[tuple[_Peer, Score]] = []
        for connection in connections:
            connection.setblocking(False)
            peer = _Peer(connection)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def run(self) -> None:
        """Serve until every HTTP process has closed its connection."""
        while self._peers:
            busy = self._scheduler.has_work or bool(self._scores)
            waits_to_send = any(peer.unsent for peer in self._peers)
            for key, _ in self._selector.select(0 if busy else 0.001 if waits_to_send else None):
                self._receive(key.data)
            if self._scores:
                self._score(*self._scores.pop(0))
            if self._scheduler.has_work:
                start = time.perf_counter()
                events = self._scheduler.step()
                self._report(events)
                self._metrics.step(self._scheduler, time.perf_counter() - start)
            for peer in tuple(self._peers):
                self._send(peer)

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
                self._cancel(peer, request.id)
            elif isinstance(request, Ask):
                peer.out.answers.append(Text(request.id, self._metrics.text(self._scheduler)))
            else:
                self._scores.append((peer, request))

    def _drop(self, peer: _Peer) -> None:
        """Forget an HTTP process that has gone, and end what it asked for."""
        self._selector.unregister(peer.connection)
        self._peers.remove(peer)
        for number in tuple(peer.sequences):
            self._cancel(peer, number)
        self._scores = [(each, score) for each, score in self._scores if each is not peer]
        peer.connection.close()

    def _add(self, peer: _Peer, request: Add) -> None:
        if self._scheduler.num_waiting >= self._max_waiting:
            self._metrics.refused.inc()
            message = f"{self._scheduler.num_waiting} requests are waiting already: try again later"
            peer.out.answers.append(Failed(request.id, 429, message))
            return
        try:
            sequence = self._sequence(request)
            self._scheduler.add(sequence)
        except QwenModelError as error:
            peer.out.answers.append(Failed(request.id, 400, str(error)))
            return
        peer.sequences[request.id] = sequence
        self._running[sequence] = _Running(peer, request.id, time.perf_counter())
        self._metrics.added(len(request.prompt))

    def _sequence(self, request: Add) -> Sequence:
        return Sequence(
            request.prompt,
            request.max_new_tokens,
            SamplingOptions(**{**request.sampling, "logit_bias": _by_token(request.sampling.get("logit_bias"))}),
            frozenset(request.end_token_ids),
            draws=request.draws,
            num_best=request.num_best,
            masker=None if request.grammar is None else self._grammar_state(request.grammar),
            salt=request.salt.encode(),
        )

    def _grammar_state(self, grammar: str) -> GrammarState:
        session = self._session
        if self._compiler is None:
            if session.tokenizer is None:
                raise QwenModelError("structured output needs a tokenizer, and this engine has none")
            ends = (*session.config.end_token_ids, *session.tokenizer.chat_end_token_ids())
            self._compiler = GrammarCompiler(session.tokenizer, session.config.model.vocab_size, ends)
        if error := self._compiler.error_of(grammar):
            raise QwenModelError(f"the grammar of the output is not valid: {error[:300]}")
        return self._compiler.compile(grammar)

    def _cancel(self, peer: _Peer, number: int) -> None:
        sequence = peer.sequences.pop(number, None)
        if sequence is not None:
            self._scheduler.cancel(sequence)
            self._end(sequence, "cancelled")

    def _report(self, events: list[Event]) -> None:
        """Put the tokens of a step into the frames of those who asked for them."""
        now = time.perf_counter()
        for event in events:
            running = self._running.get(event.sequence)
            if running is None:  # cancelled meanwhile
                continue
            self._metrics.token(now - (running.last or running.added), first=running.tokens == 0)
            running.last = now
            if event.finish_reason == "error":
                message = event.sequence.error or "the logits of this request are not finite"
                running.peer.out.answers.append(Failed(running.id, 500, str(message)))
            else:
                running.peer.out.tokens.append(_token(running, event))
            running.tokens += 1
            if event.finish_reason is not None:
                running.peer.sequences.pop(running.id, None)
                self._end(event.sequence, event.finish_reason)

    def _end(self, sequence: Sequence, reason: str) -> None:
        running = self._running.pop(sequence)
        self._metrics.ended(reason, running.tokens, time.perf_counter() - running.added)

    def _score(self, peer: _Peer, request: Score) -> None:
        """Compute the log-probabilities of a prompt's tokens."""
        try:
            logits = self._session.last_logits([request.prompt], [len(request.prompt)])[0][:-1]
        except QwenModelError as error:
            peer.out.answers.append(Failed(request.id, 400, str(error)))
            return
        largest = logits.max(-1, keepdims=True)
        logprobs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
        chosen = logprobs[np.arange(len(logprobs)), request.prompt[1:]]
        best = np.argsort(-logprobs, axis=-1, kind="stable")[:, : request.num_best]
        pairs = [
            list(zip(tokens.tolist(), row[tokens].tolist(), strict=True))
            for tokens, row in zip(best, logprobs, strict=True)
        ]
        peer.out.answers.append(Scored(request.id, chosen.tolist(), pairs))

    def _send(self, peer: _Peer) -> None:
        """Send what there is without waiting; an HTTP process that stopped reading is dropped."""
        if peer.out.tokens or peer.out.answers:
            peer.unsent += framed(peer.out)
            peer.out = Frame([], [])
        if not peer.unsent:
            return
        try:
            sent = peer.connection.send(peer.unsent)
            del peer.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(peer)
            return
        if len(peer.unsent) > MOST_UNSENT:
            LOG.error("an HTTP process does not read: its requests are ended")
            self._drop(peer)


def _by_token(bias: dict[str, float] | None) -> dict[int, float] | None:
    return None if bias is None else {int(token): value for token, value in bias.items()}


def _token(running: _Running, event: Event) -> Token:
    token = Token(running.id, event.token, event.finish_reason)
    if event.logprob is not None:
        token.logprob = event.logprob.logprob
        token.best = [(int(each), float(value)) for each, value in event.logprob.best]
    if running.tokens == 0:
        token.cached = event.sequence.num_cached
    return token
