"""Batches, streams, ends and limits of a session on a small random engine."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_model
from qwen_model import QwenModelError, SamplingOptions
from qwen_model.backends.torch import device as torch_device
from qwen_model.backends.torch.operations import TorchOperations
from qwen_model.checkpoints.chat_template import ChatOptions
from tests.qwen_model.model_files import random_prompt

prompts = st.lists(st.integers(0, 316), min_size=1, max_size=60)


@pytest.fixture
def endless(session):
    """The same engine without end tokens."""
    config = dataclasses.replace(session.config, end_token_ids=())
    return qwen_model.Session(config, session.scheduler, session.tokenizer)


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(prompts, min_size=1, max_size=14), new_tokens=st.integers(1, 12))
def test_a_batch_gives_what_each_prompt_gives_alone(session, batch, new_tokens):
    together = session.generate(batch, max_new_tokens=new_tokens).outputs
    alone = [session.generate(prompt, max_new_tokens=new_tokens).outputs[0] for prompt in batch]
    assert together == alone


def test_several_threads_share_the_batches(endless):
    """Each gets what it would get alone; and steps have tokens of several: none waits for the end of another."""
    prompts = [random_prompt(5 + 7 * i, seed=i) for i in range(6)]
    beams = endless.generate(prompts[0], max_new_tokens=5, num_beams=2).outputs[0].beams
    expected = [endless.generate(prompt, max_new_tokens=20).outputs for prompt in prompts]
    found, rows = {}, []
    batch = endless.scheduler._slots.batch

    def counted(decoding, parts):
        rows.append(len(decoding) + len(parts))
        return batch(decoding, parts)

    def work(index):
        for turn in range(3):
            if turn == index % 3:
                tokens = [event.token_id for event in endless.stream(prompts[index], max_new_tokens=20)]
                assert tokens == expected[index][0].output_ids
            found[index, turn] = endless.generate(prompts[index], max_new_tokens=20).outputs == expected[index]
        again = endless.generate(prompts[0], max_new_tokens=5, num_beams=2).outputs[0].beams
        found[index, "beams"] = [beam.output_ids for beam in again] == [beam.output_ids for beam in beams]
        # Sums round otherwise in a step with the prompts of others.
        assert [beam.score for beam in again] == pytest.approx([beam.score for beam in beams], rel=1e-5)
        found[index, "logits"] = np.isfinite(endless.logits(prompts[index])).all()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    endless.scheduler._slots.batch = counted
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        del endless.scheduler._slots.batch
    assert len(found) == 6 * 5  # no thread has failed
    assert all(found.values())
    assert max(rows) > 2
    assert not endless.scheduler.has_work


def test_nothing_of_a_request_is_left_for_the_next(endless):
    first = endless.generate(random_prompt(30), max_new_tokens=20)
    endless.generate([random_prompt(120, seed=i) for i in range(6)], max_new_tokens=40)
    assert endless.generate(random_prompt(30), max_new_tokens=20).outputs == first.outputs


def test_numbers_that_are_not_finite_stay_in_their_request(endless, engine_dir):
    prompts = [random_prompt(5), random_prompt(40)]
    first = endless.generate(prompts, max_new_tokens=20).outputs
    other = qwen_model.load_engine(engine_dir, device="cpu")
    other.device.cache.data.fill_(torch.nan)  # as requests leave it whose activations overflow
    assert qwen_model.Session(endless.config, other.scheduler).generate(prompts, max_new_tokens=20).outputs == [
        dataclasses.replace(output, text=None) for output in first
    ]


def test_logits_of_prompts_and_of_decoding_agree(endless):
    """The greedy token after each prefix, once computed with the cache and once from the whole prefix."""
    prompt = random_prompt(5)
    ids = endless.generate(prompt, max_new_tokens=30).outputs[0].output_ids
    logits = endless.logits(prompt + ids)
    assert ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_device_that_runs_ahead_gives_the_same(session, endless, monkeypatch):
    """As on a GPU, where the next step is asked for before the tokens of the last are read."""
    batch = [random_prompt(4, seed=1), random_prompt(9, seed=2)]
    cases = [{"max_new_tokens": count} for count in (1, 2, 3, 40)] + [{"sampling": SamplingOptions(top_k=20, seed=1)}]
    for each in (session, endless):
        expected = [each.generate(batch, **options).outputs for options in cases]
        monkeypatch.setattr(each.device, "runs_ahead", True)
        assert [each.generate(batch, **options).outputs for options in cases] == expected
        monkeypatch.undo()


def test_the_longest_prompt_and_output(endless):
    result = endless.generate([random_prompt(120, seed=i) for i in range(6)], max_new_tokens=40)
    assert [len(output.output_ids) for output in result.outputs] == [40] * 6
    assert {output.finish_reason for output in result.outputs} == {"length"}


def test_generation_stops_at_every_end_token(session, endless):
    """Make the 8th and the 15th token of two sequences end tokens."""
    batch = [random_prompt(4, seed=1), random_prompt(9, seed=2), random_prompt(2, seed=7)]
    free = [output.output_ids for output in endless.generate(batch, max_new_tokens=40).outputs]
    ends = (free[0][7], free[1][14])
    config = dataclasses.replace(session.config, end_token_ids=ends)
    outputs = (
        qwen_model.Session(config, session.scheduler, session.tokenizer).generate(batch, max_new_tokens=40).outputs
    )
    for output, ids in zip(outputs, free, strict=True):
        places = [i for i, token in enumerate(ids) if token in ends]
        expected = ids[: places[0] + 1] if places else ids
        assert output.output_ids == expected
        assert output.finish_reason == ("stop" if places else "length")
        assert output.text == session.tokenizer.decode(expected[:-1] if places else expected)


# Sampled text varies more than what a random model says greedily: characters of every length, and broken ones.
VARIED = SamplingOptions(temperature=1.0, seed=11)


def test_stop_strings_cut_the_text(endless):
    free = endless.generate("What", max_new_tokens=40, sampling=VARIED).outputs[0].text
    stop = free[10:13]
    output = endless.generate("What", max_new_tokens=40, sampling=VARIED, stop=["never there", stop]).outputs[0]
    assert (output.text, output.finish_reason) == (free[: free.index(stop)], "stop")
    assert len(output.output_ids) < 40


def test_a_stream_is_the_same_text_in_pieces(endless):
    free = endless.generate("What", max_new_tokens=40, sampling=VARIED).outputs[0]
    for stop in ((), (free.text[12:15],), ("never there", free.text[9] + "~")):
        whole = endless.generate("What", max_new_tokens=40, sampling=VARIED, stop=stop).outputs[0]
        events = list(endless.stream("What", max_new_tokens=40, sampling=VARIED, stop=stop))
        assert "".join(event.text for event in events) == whole.text
        assert [event.token_id for event in events] == whole.output_ids
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [whole.finish_reason]


def test_a_batch_streams_by_index(endless):
    batch = [random_prompt(4, seed=1), random_prompt(9, seed=2)]
    events = list(endless.stream(batch, max_new_tokens=10))
    outputs = endless.generate(batch, max_new_tokens=10).outputs
    for index, output in enumerate(outputs):
        assert [event.token_id for event in events if event.index == index] == output.output_ids


def test_requests_that_overlap_give_what_each_gives_alone(endless):
    prompts = [random_prompt(4, seed=1), random_prompt(70, seed=2), random_prompt(9, seed=3)]
    alone = [endless.generate(prompt, max_new_tokens=20).outputs[0] for prompt in prompts]
    streams = [endless.stream(prompt, max_new_tokens=20) for prompt in prompts[:2]]
    found = [[next(streams[0])], [next(streams[1])]]
    assert endless.generate(prompts[2], max_new_tokens=20).outputs == alone[2:]
    for _ in range(19):
        for events, stream in zip(found, streams, strict=True):
            events.append(next(stream))
    logits = endless.logits(prompts[2])
    for events, output in zip(found, alone, strict=False):
        assert [event.token_id for event in events] == output.output_ids
        assert "".join(event.text for event in events) == output.text
    assert np.array_equal(logits, endless.logits(prompts[2]))
    assert [list(stream) for stream in streams] == [[], []]


def test_what_a_closed_stream_had_is_free(endless):
    endless.generate(random_prompt(5), max_new_tokens=2)
    free = endless.scheduler.pool.num_free
    streams = [endless.stream([random_prompt(50, seed=seed)] * 2, max_new_tokens=30) for seed in range(2)]
    for stream in streams:
        next(stream)
    assert endless.scheduler.pool.num_free < free
    streams[0].close()
    del streams, stream  # as good as closed
    endless.generate(random_prompt(5), max_new_tokens=2)
    assert endless.scheduler.pool.num_free == free


def test_samples_of_a_prompt(endless):
    """The first is what one output is; the others draw differently, each as in every call."""
    prompts = [random_prompt(70, seed=1), random_prompt(9, seed=2)]
    sampling = SamplingOptions(temperature=1.0, seed=5)
    one = endless.generate(prompts[0], max_new_tokens=10, sampling=sampling).outputs
    outputs = endless.generate(prompts, max_new_tokens=10, sampling=sampling, n=4).outputs
    assert len(outputs) == 8
    assert outputs[:1] == one
    assert len({tuple(output.output_ids) for output in outputs}) == 8
    assert endless.generate(prompts, max_new_tokens=10, sampling=sampling, n=4).outputs == outputs
    events = list(endless.stream(prompts, max_new_tokens=10, sampling=sampling, n=4))
    for index, output in enumerate(outputs):
        assert [event.token_id for event in events if event.index == index] == output.output_ids


def test_log_probabilities(endless):
    prompt = random_prompt(9)
    output = endless.generate(prompt, max_new_tokens=6, logprobs=3, sampling=SamplingOptions(top_k=9, seed=1)).outputs[
        0
    ]
    logits = endless.logits(prompt + output.output_ids)[len(prompt) - 1 : -1]
    expected = torch.from_numpy(logits).log_softmax(-1)
    assert output.logprobs is not None
    for token, row, found in zip(output.output_ids, expected, output.logprobs, strict=True):
        best = row.topk(3)
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in found.best] == best.indices.tolist()
        np.testing.assert_allclose([logprob for _, logprob in found.best], best.values, atol=1e-4)
    events = list(endless.stream(prompt, max_new_tokens=6, logprobs=0))
    assert all(event.logprob is not None and event.logprob.best == [] for event in events)
    assert endless.generate(prompt, max_new_tokens=6).outputs[0].logprobs is None


def test_chat_uses_the_template_and_ends_with_the_turn(session):
    """The tokenizer knows the end of a turn, 257 here; the checkpoint's end tokens are others."""
    messages = [{"role": "user", "content": "Hi"}]
    ids = session.tokenizer.apply_chat_template(messages)
    config = dataclasses.replace(session.config, end_token_ids=(*session.config.end_token_ids, 257))
    expected = qwen_model.Session(config, session.scheduler, session.tokenizer).generate(ids).outputs
    assert session.generate("Hi", chat=True).outputs == expected
    assert session.generate(messages, chat=True).outputs == expected
    assert session.generate([messages], chat=True).outputs == expected


def test_a_chat_s_options_reach_the_template(session):
    template = "{{ tools | length }}{% if loud %}!{% endif %}{{ messages[0].content }}"
    message = [{"role": "user", "content": "a<|im_end|>"}]
    more = {"tools": [{"name": "f"}, {"name": "g"}], "chat_template_kwargs": {"loud": True}, "chat_template": template}
    for sanitize in (True, False):
        ids = session.tokenizer.apply_chat_template(
            message, True, ChatOptions(more["tools"], more["chat_template_kwargs"], template, sanitize)
        )
        assert session.tokenizer.decode(ids, skip_special_tokens=False) == "2!a<|im_end|>"
        assert (257 in ids) is not sanitize
        expected = session.generate(ids, stop_token_ids=[257]).outputs[0].output_ids
        options = {"chat": True, "sanitize_control_tokens": sanitize, **more}
        assert session.generate(message, **options).outputs[0].output_ids == expected
        assert [event.token_id for event in session.stream(message, **options)] == expected


def test_control_tokens_of_a_prompt_can_stay_text(session):
    text = "a<|im_end|>b"
    for sanitize in (True, False):
        ids = session.tokenizer.encode(text, parse_special_tokens=not sanitize)
        assert (257 in ids) is not sanitize
        assert session.generate(text, sanitize_control_tokens=sanitize).outputs == session.generate(ids).outputs


def test_timing_counts_tokens(endless):
    timing = endless.generate([random_prompt(7), random_prompt(3)], max_new_tokens=5).timing
    assert (timing.prompt_tokens, timing.generated_tokens) == (10, 10)
    assert timing.decode_tokens_per_second == pytest.approx(8 / timing.decode_seconds)


def test_small_products_use_one_thread_and_the_process_keeps_its_number(endless, monkeypatch):
    """A step of one token is small; a prompt is not, where the limit is set below it."""
    seen = []
    linear = TorchOperations.linear

    def counting(*args, **options):
        seen.append(torch.get_num_threads())
        return linear(*args, **options)

    monkeypatch.setattr(TorchOperations, "linear", counting)
    monkeypatch.setattr(torch_device, "ONE_THREAD_WORK", 2 * endless.device._layer_size)
    torch.set_num_threads(2)
    try:
        endless.generate(random_prompt(9), max_new_tokens=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    half = len(seen) // 2
    assert (set(seen[:half]), set(seen[half:])) == ({2}, {1})


def test_prompts_of_numpy_and_pytorch(endless):
    prompt = random_prompt(7)
    expected = endless.generate(prompt, stop=None).outputs
    for same in (np.array(prompt), list(np.array(prompt)), torch.tensor(prompt), tuple(prompt)):
        assert endless.generate(same).outputs == endless.generate([same]).outputs == expected
        assert np.array_equal(endless.logits(same), endless.logits(prompt))
    batch = [prompt, prompt[::-1]]
    assert endless.generate(np.array(batch)).outputs == endless.generate(batch).outputs


def test_logits_take_token_ids_only(session):
    for wrong in ("text", None, [1.5], [[1, 2]]):
        with pytest.raises(QwenModelError, match="input_ids must be a list of token ids"):
            session.logits(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[0] * 121]}, "121 tokens.*limit of 120.*--max-input-len"),
        ({"prompts": [[1]], "num_beams": 7}, "7 beams.*limit of 6.*--max-batch-size"),
        ({"prompts": [[1]], "num_beams": 2, "n": 2}, "beam search gives one output"),
        ({"prompts": [[1]], "num_beams": 2, "logprobs": 1}, "beam search gives one output"),
        ({"prompts": [[1]], "n": 0}, "n must be a positive integer, not 0"),
        ({"prompts": [[1]], "logprobs": -1}, "logprobs must be an integer from 0 to 128, not -1"),
        ({"prompts": [[1]], "logprobs": True}, "logprobs must be an integer from 0 to 128, not True"),
        ({"prompts": [[1, 317]]}, "token id 317.*0 to 316"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"prompts": [[1, 400, -1, 2**70]]}, "token id 400"),
        ({"prompts": [[1], [2, 2**70]]}, f"prompt 1 has the token id {2**70}"),
        ({"prompts": [[1]], "max_new_tokens": 41}, "limit of 40.*--max-output-len"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "must be a positive integer, not 0"),
        ({"prompts": [[1]], "num_beams": 0}, "num_beams"),
        ({"prompts": [[1]], "num_beams": 2, "sampling": SamplingOptions(top_k=4)}, "beam search"),
        ({"prompts": [[1]], "stop": [""]}, "empty"),
        ({"prompts": [[1]], "chat": True}, "chat template"),
        ({"prompts": None}, "prompts must be strings.*not None"),
        ({"prompts": 3}, "prompts must be strings.*not 3"),
        ({"prompts": b"abc"}, "prompts must be strings.*not b'abc'"),
        ({"prompts": [b"abc"]}, "a prompt must be a string.*not b'abc'"),
        ({"prompts": [1.7, 2.2]}, "a prompt must be a string.*not 1.7"),
        ({"prompts": [[1.7, 2.2]]}, r"a prompt must be a string.*not \[1.7, 2.2\]"),
        ({"prompts": [True, False]}, r"a prompt must be a string.*not \[True, False\]"),
        ({"prompts": [[1, True]]}, "a prompt must be a string"),
        ({"prompts": [1, "a"]}, "a prompt must be a string"),
        ({"prompts": np.array([[0.5]])}, "a prompt must be a string"),
        ({"prompts": [{"role": "user"}]}, "needs chat=True"),
        ({"prompts": [{"role": "user"}], "chat": True}, "message 0 must be"),
        ({"prompts": [[1]], "max_new_tokens": 2.5}, "max_new_tokens must be a positive integer.*not 2.5"),
        ({"prompts": [[1]], "max_new_tokens": True}, "max_new_tokens must be a positive integer.*not True"),
        ({"prompts": [[1]], "num_beams": 2.0}, "num_beams must be a positive integer.*not 2.0"),
        ({"prompts": [[1]], "stop": 3}, "stop must be a string.*not 3"),
        ({"prompts": [[1]], "stop": [3]}, r"stop must be a string.*not \[3\]"),
        ({"prompts": [[1]], "sampling": {"top_k": 3}}, "sampling must be a SamplingOptions"),
        ({"prompts": [[1]], "num_beams": 2, "sampling": {"top_k": 3}}, "sampling must be a SamplingOptions"),
        ({"prompts": "x", "tools": [{}]}, "tools is for the chat template, which needs chat=True"),
        ({"prompts": "x", "chat_template": "x"}, "chat_template is for the chat template"),
        ({"prompts": "x", "chat_template_kwargs": {}}, "chat_template_kwargs is for the chat template"),
        ({"prompts": "x", "chat": True, "tools": [{}]}, "no place for tools"),
        ({"prompts": "x", "chat": True, "chat_template_kwargs": 3}, "chat_template_kwargs must map"),
        ({"prompts": "x", "sanitize_control_tokens": "yes"}, "sanitize_control_tokens must be True or False"),
    ],
)
def test_errors(session, arguments, message):
    with pytest.raises(QwenModelError, match=message):
        session.generate(**arguments)


def test_without_a_tokenizer(session):
    bare = qwen_model.Session(session.config, session.scheduler)
    assert bare.generate([1, 2, 3]).outputs[0].text is None
    with pytest.raises(QwenModelError, match=r"no tokenizer.*--input-ids"):
        bare.generate("text")
    with pytest.raises(QwenModelError, match="stop strings need a tokenizer"):
        bare.generate([1, 2, 3], stop="x")


def test_last_logits_of_a_batch_are_those_of_each_prompt_alone(endless):
    prompts = [random_prompt(7, seed=1), random_prompt(3, seed=2), random_prompt(20, seed=3)]
    counts = [2, 3, 1]
    found = endless.last_logits(prompts, counts)
    for prompt, count, logits in zip(prompts, counts, found, strict=True):
        np.testing.assert_allclose(logits, endless.logits(prompt)[-count:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 4])
def test_last_logits_of_more_tokens_than_there_are(endless, count):
    with pytest.raises(QwenModelError, match=f"a prompt of 3 tokens has no logits after its last {count}"):
        endless.last_logits([[1, 2, 3]], [count])
