"""What holds for a session of any back end, for tests on stand-ins and on GPUs. No PyTorch."""

import dataclasses

import pytest

import qwen_model


def check_streams(session: qwen_model.Session, prompts: list[list[int]], **options) -> None:
    """A stream's tokens and texts are those that `generate` gives at once."""
    outputs = session.generate(prompts, **options).outputs
    events = list(session.stream(prompts, **options))
    for index, output in enumerate(outputs):
        of_prompt = [event for event in events if event.index == index]
        assert [event.token_id for event in of_prompt] == output.output_ids
        assert [event.finish_reason for event in of_prompt[:-1]] == [None] * (len(of_prompt) - 1)
        assert of_prompt[-1].finish_reason == output.finish_reason
        if output.text is not None:
            assert "".join(event.text for event in of_prompt) == output.text


def check_that_nothing_is_left_behind(session: qwen_model.Session, prompts: list[list[int]]) -> None:
    """A request that is refused, closed half-way or made while another runs leaves the session as good as new."""
    endless = dataclasses.replace(session.config, end_token_ids=())
    session = qwen_model.Session(endless, session.scheduler, session.tokenizer)
    expected = session.generate(prompts, max_new_tokens=10).outputs
    limit = session.config.limits.max_input_len
    for _ in range(2):
        with pytest.raises(qwen_model.QwenModelError, match=f"engine's limit of {limit}"):
            session.generate([0] * (limit + 1))
        assert session.generate(prompts, max_new_tokens=10).outputs == expected
        stream = session.stream(prompts[:1], max_new_tokens=20)
        for _ in range(3):
            next(stream)
        stream.close()
        assert session.generate(prompts, max_new_tokens=10).outputs == expected
        stream = session.stream(prompts, max_new_tokens=20)
        tokens = [next(stream).token_id for _ in range(3)]
        assert session.generate(prompts, max_new_tokens=10).outputs == expected
        tokens += [event.token_id for event in stream]
        assert len(tokens) == 20 * len(prompts)
        assert session.generate(prompts, max_new_tokens=10).outputs == expected
