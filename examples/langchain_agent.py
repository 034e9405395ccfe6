"""Let a model call a function, and answer with what it returned: an agent's loop, with LangChain.

python langchain_agent.py [URL]

The model must have been trained to call tools, as Qwen2.5-Instruct and Qwen3 are.
"""

import os
import sys

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
KEY = os.environ.get("OPENAI_API_KEY", "none")
MOST_STEPS = 5


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two integers."""
    return a * b


def main() -> None:
    """Ask, call what the model asks for, and print its answer."""
    model = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0].id
    chat = ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key=KEY, max_tokens=256).bind_tools([multiply])
    messages = [HumanMessage("How much is 1234 times 5678?")]
    for _ in range(MOST_STEPS):
        answer = chat.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        for call in answer.tool_calls:
            print(f"{call['name']}({call['args']})")
            messages.append(ToolMessage(str(multiply.invoke(call["args"])), tool_call_id=call["id"]))
    print(messages[-1].content)


try:
    main()
except openai.APIConnectionError as error:
    sys.exit(f"no server at {URL}: {error}")
except openai.APIStatusError as error:
    sys.exit(f"{URL} answers {error.status_code}: {error.message}")
