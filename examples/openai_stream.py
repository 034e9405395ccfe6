"""Read a stream with OpenAI's client: reasoning, answer and the number of tokens.

python openai_stream.py [URL]
"""

import os
import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))


def main() -> None:
    """Ask one question."""
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is recursion?"}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            if reasoning := getattr(choice.delta, "reasoning_content", None):
                print(reasoning, end="", flush=True)
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")


try:
    main()
except openai.APIConnectionError as error:
    sys.exit(f"no server at {URL}: {error}")
except openai.APIStatusError as error:
    sys.exit(f"{URL} answers {error.status_code}: {error.message}")
