"""Define the bodies of requests: OpenAI's fields, and those that vLLM adds to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from .errors import ApiError

LOG = logging.getLogger(__name__)


def _number(value: Any) -> Any:
    """Refuse true, false and text, which pydantic takes for numbers."""
    if isinstance(value, (bool, str)):
        raise ValueError("a number is expected")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
LogitBias = dict[StrictStr, Annotated[Number, Field(ge=-100, le=100)]]
Stop = StrictStr | list[StrictStr]
MOST_CHOICES = 128
MOST_LOGPROBS = 20
INSTEAD = ": response_format of type json_schema is"
UNSUPPORTED = {
    "structured_outputs": INSTEAD,
    "structural_tag": INSTEAD,
    "use_beam_search": "",
    "chat_template": ": the model's own is used",
    "functions": ": tools are",
    "function_call": ": tool_choice is",
    "bad_words": "",
    "allowed_token_ids": "",
    "logits_processors": "",
}
"""Fields of other servers that change what is answered, and what to say beside that; guided_* are refused, too."""

_warned: set[str] = set()


class Body(BaseModel):
    """Take fields that are not known, too, and warn of each once: clients of other servers send them.

    Those of `UNSUPPORTED` are refused: without them the answer would be another one than was asked for.
    """

    model_config = ConfigDict(extra="allow")

    def model_post_init(self, context: Any) -> None:
        """Warn of unknown fields.

        Raises:
            ApiError: one is known, and not supported.
        """
        for name, value in (self.model_extra or {}).items():
            if (name in UNSUPPORTED or name.startswith("guided_")) and value not in (None, False):
                raise ApiError(400, f"{name} is not supported{UNSUPPORTED.get(name, INSTEAD)}", name)
            if name not in _warned and len(_warned) < 1000:
                _warned.add(name)
                LOG.warning("the field %.80r of a request is not known, and is ignored", name)


class StreamOptions(Body):
    """Hold OpenAI's `stream_options`, and vLLM's, by which every chunk has the usage so far."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False

    @property
    def every_usage(self) -> bool:
        """Tell whether every chunk has the usage; vLLM, too, wants both fields for that."""
        return self.include_usage and self.continuous_usage_stats


class SamplingFields(Body):
    """Hold the fields that say how tokens are chosen and where an output ends."""

    model: StrictStr | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: Stop | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=1000)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    user: StrictStr | None = None


class JsonSchema(BaseModel):
    """Hold the schema of a `response_format`."""

    name: StrictStr = "output"
    description: StrictStr | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """Hold OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(BaseModel):
    """Hold a function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """Hold one of OpenAI's `tools`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """Hold the name in a `tool_choice`."""

    name: StrictStr


class NamedTool(BaseModel):
    """Hold a `tool_choice` of one function."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields):
    """Hold the body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    store: StrictBool | None = None


Prompt = StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]


class CompletionRequest(SamplingFields):
    """Hold the body of /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = 16
    echo: StrictBool | None = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None


class TokenizeRequest(BaseModel):
    """Hold the body of /tokenize: a prompt, or messages for the chat template."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(BaseModel):
    """Hold the body of /detokenize."""

    model: StrictStr | None = None
    tokens: list[Annotated[StrictInt, Field(ge=0)]]


class ResponsesRequest(Body):
    """Hold the body of /v1/responses: text and tool calls, without state on the server."""

    model: StrictStr | None = None
    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stream: StrictBool | None = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: dict[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    store: StrictBool | None = None
    previous_response_id: StrictStr | None = None
    chat_template_kwargs: dict[str, Any] | None = None
