"""A server with a small part of OpenAI's API, whose faults tests choose."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "fake-model"
GAP = 0.01  # seconds between events


class Handler(BaseHTTPRequestHandler):
    """Answers with the words that were asked for, one in each event; `server.fault` says what goes wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": MODEL}]} if self.server.fault != "no models" else {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        fault = self.server.fault
        if fault == "error":
            self.reply(500, {"error": {"message": "the engine is on fire"}})
            return
        if fault == "hang up at once":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = self.path.endswith("/chat/completions")
        if chat:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        self.chunk(b": a comment\n\n")
        for number in range(body["max_tokens"]):
            time.sleep(GAP)
            last = number == body["max_tokens"] - 1
            if fault == "hang up" and number == 2:
                self.close_connection = True
                return
            if fault == "error in the stream" and number == 2:
                self.event({"error": {"message": "no memory"}})
                break
            if fault == "not JSON":
                self.chunk(b"data: <html>\n\n")
                break
            if fault == "other events":
                self.event({"choices": ["ab"]})
                break
            words = {"delta": {"content": "ab"}} if chat else {"text": "ab"}
            self.event({"choices": [{**words, "finish_reason": "length" if last else None}]})
        if self.server.usage:
            usage = {"prompt_tokens": 5, "completion_tokens": body["max_tokens"]}
            self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, value):
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def running(fault=None, usage=True):
    """Yield a running server; its address is `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.usage, server.bodies = fault, usage, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
