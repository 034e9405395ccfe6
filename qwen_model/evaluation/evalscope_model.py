"""Let EvalScope (ModelScope's evaluation framework) evaluate an engine: its model API `qwen_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evalscope.api.messages import ChatMessage, ChatMessageAssistant
from evalscope.api.model import ChatCompletionChoice, GenerateConfig, ModelAPI, ModelOutput, ModelUsage
from evalscope.api.registry import register_model_api
from evalscope.api.tool import ToolChoice, ToolInfo

from ..common.errors import QwenModelError
from ..engine import load_engine
from ..interface.sampling import SamplingOptions

STOP_REASONS: Mapping[str, Any] = {"stop": "stop", "length": "max_tokens"}
GREEDY_NAMES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "seed", *GREEDY_NAMES)


@register_model_api("qwen_model")
class QwenModelAPI(ModelAPI):
    """Answer chats with an engine, whose folder is the model's name; EvalScope's threads share its batches."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        device: str | None = None,
        enable_thinking: bool | None = None,
        **_: Any,
    ):
        """Load the engine in the folder `model_name`.

        base_url, api_key: of servers; not used.
        device: "cpu", "cuda", "cuda:1"; None: the GPU if there is one.
        enable_thinking: a variable of Qwen3's chat template.

        Raises:
            QwenModelError: the engine cannot be loaded.
        """
        super().__init__(model_name, base_url, api_key, config or GenerateConfig())
        self._session = load_engine(model_name, device=device)
        self._template_kwargs = None if enable_thinking is None else {"enable_thinking": enable_thinking}

    def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation: greedily, unless the configuration asks for sampling.

        Raises:
            QwenModelError: the conversation is too long or the configuration asks for what an engine does not do.
        """
        if tools:
            raise QwenModelError("EvalScope's tools are not supported on an engine")
        messages = [{"role": message.role, "content": message.text} for message in input]
        limit = self._session.config.limits.max_output_len
        result = self._session.generate(
            [messages],
            max_new_tokens=limit if config.max_tokens is None else min(config.max_tokens, limit),
            sampling=_sampling(config),
            stop=config.stop_seqs,
            chat=True,
            chat_template_kwargs=self._template_kwargs,
        )
        output, timing = result.outputs[0], result.timing
        message = ChatMessageAssistant(content=output.text or "", model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=STOP_REASONS[output.finish_reason])],
            usage=ModelUsage(
                input_tokens=timing.prompt_tokens,
                output_tokens=timing.generated_tokens,
                total_tokens=timing.prompt_tokens + timing.generated_tokens,
            ),
            time=timing.prefill_seconds + timing.decode_seconds,
        )


def _sampling(config: GenerateConfig) -> SamplingOptions:
    given = {name: value for name in SAMPLING_NAMES if (value := getattr(config, name)) is not None}
    if config.do_sample is False:
        given = {name: value for name, value in given.items() if name in GREEDY_NAMES}
    elif config.do_sample:
        given.setdefault("temperature", 1.0)
    return SamplingOptions(**given)
