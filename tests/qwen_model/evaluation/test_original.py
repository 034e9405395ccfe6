"""The original in transformers generates what the engine generates, and its steps can be timed."""

import pytest
import torch
import transformers

from qwen_model.common.errors import OutOfMemoryError, QwenModelError
from qwen_model.evaluation.original import Original, check_loadable
from qwen_model.interface.sampling import SamplingOptions
from tests.qwen_model.conftest import END_TOKENS
from tests.qwen_model.model_files import random_prompt

PROMPTS = [random_prompt(9, seed=1), random_prompt(4, seed=2), random_prompt(15, seed=3)]


@pytest.fixture(scope="module")
def original(model_dir):
    return Original(str(model_dir), "float32", "cpu")


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_same_tokens_as_the_engine(original, session, num_beams):
    """The prompts have different lengths: padding on the left changes nothing."""
    expected = session.generate(PROMPTS, max_new_tokens=30, sampling=SamplingOptions(), num_beams=num_beams).outputs
    found = original.generate(PROMPTS, 30, END_TOKENS, num_beams)
    assert found == [output.output_ids for output in expected]


def test_without_end_tokens_all_tokens_are_generated_and_each_step_is_seen(original):
    steps = []
    found = original.generate(PROMPTS, 11, on_step=lambda: steps.append(None))
    assert [len(ids) for ids in found] == [11, 11, 11]
    assert len(steps) == 11


def test_settings_of_the_checkpoint_change_nothing(model_dir, original, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=12, eos_token_id=list(range(300))
    )
    model.save_pretrained(tmp_path)
    assert Original(str(tmp_path), "float32", "cpu").generate(PROMPTS, 9) == original.generate(PROMPTS, 9)


def test_tokens_that_the_model_does_not_have(original):
    with pytest.raises(QwenModelError, match="the original has 317 tokens, and a prompt has the token 317"):
        original.generate([[5, 317]], 1)


def test_models_that_cannot_be_loaded(tmp_path):
    for load in (check_loadable, lambda model: Original(model, "float32", "cpu")):
        with pytest.raises(QwenModelError, match=f"transformers cannot load {tmp_path}: ") as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_does_not_suffice(original, monkeypatch, error):
    def generate(*arguments, **options):
        raise error

    monkeypatch.setattr(original._model, "generate", generate)
    with pytest.raises(OutOfMemoryError):
        original.generate(PROMPTS, 1)
