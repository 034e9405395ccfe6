"""Stand in for the engine's process: answer every request with a text that the test gives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from qwen_model.checkpoints.tokenizer import Tokenizer
from qwen_model.serving.wire import (
    REQUEST_DECODER,
    Add,
    Ask,
    Cancel,
    Failed,
    Frame,
    Frames,
    Score,
    Scored,
    Text,
    Token,
    framed,
)

LOGPROB = -0.5


class StubEngine:
    """Serve one connection in a thread.

    reply: gives the text that continues a request's prompt; it ends with one of the request's end tokens.
    refusal: an error that every request gets instead. `requests` has all that came.
    """

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[Add], str]):
        self.reply = reply
        self.refusal: tuple[int, str] | None = None
        self.holds = False  # give one token, and never end
        self.silent = False  # give none
        self.requests: list[Add | Cancel | Ask | Score] = []
        self._tokenizer = tokenizer
        self._ours, self.connection = socket.socketpair()
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Close the connection, as the end of the process does."""
        self._ours.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        frames = Frames()
        while data := self._ours.recv(1 << 16):
            for content in frames.push(data):
                request = REQUEST_DECODER.decode(content)
                self.requests.append(request)
                if not isinstance(request, Cancel):
                    for frame in self._answer(request):
                        self._ours.sendall(framed(frame))

    def _answer(self, request: Add | Ask | Score) -> list[Frame]:
        if self.refusal is not None and not isinstance(request, Ask):
            return [Frame([], [Failed(request.id, *self.refusal)])]
        if isinstance(request, Ask):
            return [Frame([], [Text(request.id, "# TYPE x counter\n")])]
        if isinstance(request, Score):
            rest = request.prompt[1:]
            return [Frame([], [Scored(request.id, [LOGPROB] * len(rest), [[(token, LOGPROB)] for token in rest])])]
        return [] if self.silent else [Frame([token], []) for token in self._tokens(request)]

    def _tokens(self, request: Add) -> list[Token]:
        ids = self._tokenizer.encode(self.reply(request), add_special_tokens=False)
        if self.holds:
            return [Token(request.id, ids[0])]
        ids = [*ids, request.end_token_ids[0]][: request.max_new_tokens]
        tokens = [Token(request.id, token) for token in ids]
        tokens[-1].finish_reason = "stop" if ids[-1] in request.end_token_ids else "length"
        for token in tokens:
            if request.num_best is not None:
                token.logprob = LOGPROB
                token.best = [(token.token, LOGPROB), (0, -1.0)][: request.num_best]
        return tokens
