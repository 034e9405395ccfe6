"""Make the data of the tasks from the packaged model's held-out text; lm-eval calls these functions by name."""

from __future__ import annotations

import random
from typing import Any

import datasets  # lm-eval brings it

from qwen_model.packaged_model import held_out_text

LINES_BEFORE = 5
ROWS_PER_FILE = 4
SHORTEST_LINE = 20  # characters


def lines(**_: Any) -> dict[str, datasets.Dataset]:
    """Return contexts of five lines, and the line that follows: among three others of the file, and cut at its end."""
    drawn = random.Random(0)
    rows = []
    for file in _files():
        candidates = [line for line in file.split("\n") if len(line.strip()) >= SHORTEST_LINE]
        for _row in range(ROWS_PER_FILE):
            place = drawn.randrange(LINES_BEFORE, len(candidates))
            right = candidates[place]
            wrong = drawn.sample([line for line in candidates if line != right], 3)
            choices = drawn.sample([right, *wrong], 4)
            context = "\n".join(candidates[place - LINES_BEFORE : place]) + "\n"
            beginning, space, word = right.rstrip().rpartition(" ")
            row = {"context": context, "choices": choices, "answer": choices.index(right)}
            rows.append({**row, "beginning": beginning, "ending": space + word})
    return {"test": datasets.Dataset.from_list(rows)}


def texts(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the first 6000 characters of each file."""
    return {"test": datasets.Dataset.from_list([{"text": file[:6000]} for file in _files()])}


def _files() -> list[str]:
    return [file for file in held_out_text().split("<|endoftext|>") if len(file) > 2000]
