"""Run an exported model of standard operators in ONNX Runtime on the CPU, as Optimum does: padded on the left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime


class OnnxModel:
    """One batch at a time; the cache begins with zero tokens and comes back longer from each step."""

    def __init__(self, path: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.outputs = [given.name for given in self.session.get_outputs()]
        self.dtype = np.float16 if "float16" in self.inputs["past_key_values.0.key"].type else np.float32

    def begin(self, prompts: list[list[int]]) -> np.ndarray:
        """The logits after every token of each prompt, [prompts, longest, vocabulary]."""
        longest = max(map(len, prompts))
        self.mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        past = [name for name in self.inputs if name.startswith("past_key_values")]
        self.past = {name: self._empty(name, len(prompts)) for name in past}
        ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        return self._step(ids, np.maximum(self.mask.cumsum(axis=1) - 1, 0))

    def more(self, tokens: list[list[int]]) -> np.ndarray:
        """The logits after each of as many more tokens of every sequence, [prompts, tokens, vocabulary]."""
        ids = np.array(tokens)
        self.mask = np.concatenate([self.mask, np.ones_like(ids)], axis=1)
        return self._step(ids, self.mask.cumsum(axis=1)[:, -ids.shape[1] :] - 1)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The tokens of greedy decoding."""
        steps = [self.begin(prompts)[:, -1].argmax(axis=-1)]
        while len(steps) < max_new_tokens:
            steps.append(self.more([[token] for token in steps[-1]])[:, -1].argmax(axis=-1))
        return np.stack(steps, axis=1).tolist()

    def _empty(self, name: str, batch: int) -> np.ndarray:
        _, heads, _, size = self.inputs[name].shape
        return np.zeros((batch, heads, 0, size), self.dtype)

    def _step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        given = {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "prompt_lengths": self.prompt_lengths,
            **self.past,
        }
        logits, *present = self.session.run(None, {name: given[name] for name in self.inputs})
        self.past = dict(zip(self.past, present, strict=True))
        return logits
