"""Get a whole answer, JSON that follows a schema, and a tool call, with OpenAI's client.

python openai_chat.py [URL]

The tool call needs a model with tools, such as Qwen2.5-Instruct or Qwen3.
"""

import json
import os
import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))


def main() -> None:
    """Ask three times."""
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Where is the Eiffel tower, and how is the weather there?"}]

    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=64)
    print(answer.choices[0].message.content)

    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    )
    print(json.loads(answer.choices[0].message.content))

    weather = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(model=model, messages=messages, tools=[weather], tool_choice="required")
    for call in answer.choices[0].message.tool_calls:
        print(call.function.name, json.loads(call.function.arguments))


try:
    main()
except openai.APIConnectionError as error:
    sys.exit(f"no server at {URL}: {error}")
except openai.APIStatusError as error:
    sys.exit(f"{URL} answers {error.status_code}: {error.message}")
