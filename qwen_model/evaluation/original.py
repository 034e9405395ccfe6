"""Generate with the original of an engine: its checkpoint in Hugging Face transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..common.errors import OutOfMemoryError, QwenModelError
from ..common.extras import import_extra

NEEDED_FOR = "the original in transformers (--hf)"
LONGEST_REASON = 300  # characters of an error of transformers


def check_loadable(model: str) -> None:
    """Check that transformers is installed and knows the checkpoint, without loading its weights.

    Raises:
        QwenModelError: transformers is not installed, or does not find or know the model.
    """
    import_extra("torch", NEEDED_FOR, "torch")
    transformers = import_extra("transformers", NEEDED_FOR, "eval")
    with one_line_errors(model):
        transformers.AutoConfig.from_pretrained(model)


class Original:
    """Generate greedily or with beams; nothing is taken from the checkpoint's generation_config.json."""

    def __init__(self, model: str, dtype: str, device: str | None = None):
        """Load the checkpoint `model`, a folder or a name of the Hugging Face hub, in the engine's type.

        device: "cpu", "cuda", "cuda:1"; None: the GPU if there is one.

        Raises:
            QwenModelError: transformers is not installed, or cannot load the model.
            OutOfMemoryError: the device's memory does not suffice.
        """
        self._torch = torch = import_extra("torch", NEEDED_FOR, "torch")
        transformers = import_extra("transformers", NEEDED_FOR, "eval")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        gc.collect()  # an engine that was measured before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with one_line_errors(model), self._memory_errors():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
            self._model = loaded.to(device).eval()
        self._generation_config = transformers.GenerationConfig
        self.name = f"transformers {transformers.__version__}"
        self.vocab_size = int(self._model.get_input_embeddings().num_embeddings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_token_ids: Collection[int] = (),
        num_beams: int = 1,
        on_step: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, up to and including the first end token.

        end_token_ids: none: `max_new_tokens` tokens are generated.
        on_step: called when the tokens of each step are computed and on the host; not with beams.

        Raises:
            QwenModelError: a prompt has a token that the model does not have.
            OutOfMemoryError: the device's memory does not suffice.
        """
        largest = max(max(prompt) for prompt in prompts)
        if largest >= self.vocab_size:
            raise QwenModelError(f"the original has {self.vocab_size} tokens, and a prompt has the token {largest}")
        torch, ends = self._torch, sorted(end_token_ids)
        padding = ends[0] if ends else 0
        width = max(len(prompt) for prompt in prompts)
        rows = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        # The model's own configuration, too, because transformers takes from it what the given one leaves open.
        self._model.generation_config = self._generation_config(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=ends or None,
            pad_token_id=padding,
        )
        with self._memory_errors():
            found = self._model.generate(
                torch.tensor(rows, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                streamer=None if on_step is None else _StepCounter(on_step),
            )
        return [_up_to_end(row[width:], end_token_ids) for row in found.tolist()]

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except self._torch.OutOfMemoryError as error:
            raise OutOfMemoryError(". ".join(str(error).split(". ")[:2])) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # PyTorch on a CPU
                raise OutOfMemoryError("the memory does not suffice") from error
            raise


class _StepCounter:
    """Implement a streamer of transformers for a batch of any size: `put` gets the prompts, then each step."""

    def __init__(self, on_step: Callable[[], None]):
        self._on_step = on_step
        self._prompts_seen = False

    def put(self, tokens: Any) -> None:
        if self._prompts_seen:
            self._on_step()
        self._prompts_seen = True

    def end(self) -> None:
        pass


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into a QwenModelError."""
    try:
        yield
    except QwenModelError:  # one line already, such as that memory ran out
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."
        raise QwenModelError(f"transformers cannot load {model}: {short}") from error


def _up_to_end(tokens: list[int], end_token_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_token_ids), len(tokens) - 1)
    return tokens[: end + 1]
