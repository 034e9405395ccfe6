"""Read several streams at once with httpx and asyncio.

python async_stream.py [URL]
"""

import asyncio
import json
import os
import sys

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
QUESTIONS = ["What is a tuple?", "What is a set?", "What is a dictionary?"]


async def answer(client: httpx.AsyncClient, question: str) -> str:
    """Return an answer, which comes as server-sent events."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return text


async def main() -> None:
    """Ask all questions."""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    async with httpx.AsyncClient(base_url=URL, headers=headers, timeout=600) as client:
        for question, text in zip(
            QUESTIONS, await asyncio.gather(*(answer(client, each) for each in QUESTIONS)), strict=True
        ):
            print(f"{question}\n{text}\n")


try:
    asyncio.run(main())
except httpx.HTTPStatusError as error:
    sys.exit(f"{URL} answers {error.response.status_code}: {error.response.text}")
except httpx.TransportError as error:
    sys.exit(f"no server at {URL}: {error}")
