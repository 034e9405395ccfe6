"""Ask a server for a whole answer and for a stream, with the standard library alone.

python plain.py [URL]
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}


def ask(body: dict[str, Any]) -> Any:
    """Return the response to a chat."""
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), HEADERS)
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        sys.exit(f"{URL} answers {error.code}: {error.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"no server at {URL}: {error.reason}")


def whole(question: str) -> str:
    """Return an answer."""
    with ask({"messages": [{"role": "user", "content": question}], "max_tokens": 64}) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def streamed(question: str) -> Iterator[str]:
    """Yield the pieces of an answer."""
    messages = [{"role": "user", "content": question}]
    with ask({"messages": messages, "max_tokens": 64, "stream": True}) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


print(whole("What is a list comprehension?"))
for piece in streamed("What is a generator?"):
    print(piece, end="", flush=True)
print()
