"""The script that makes the packaged model splits its corpus, and runs as a whole at toy sizes."""

import json
from random import Random

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tools.python_corpus import collect_corpus, training_documents
from tools.train_packaged_model import main

MODULE = '''"""Module number {number}."""
import os

def area_{number}(width, height):
    """Return the area of a rectangle {number}."""
    return width * height + {number}

class Shape{number}:
    """A shape with {number} corners."""
''' + "".join(
    f"    def method_{letter}(self, {letter}):\n        return self.{letter} + {letter!r}\n" for letter in "abcdefghij"
)


@pytest.fixture
def stdlib_dir(tmp_path):
    """Make a folder that looks like a standard library."""
    folder = tmp_path / "lib"
    (folder / "package" / "__pycache__").mkdir(parents=True)
    (folder / "site-packages").mkdir()
    random = Random(0)
    for number in range(100):
        name = f"module_{number}.py" if number % 2 else f"package/module_{number}.py"
        words = "".join(random.choices("abcdefghij     ", k=400))
        (folder / name).write_text(MODULE.format(number=number) + f"# {words}\n")
    (folder / "os.py").write_text(MODULE.format(number=1000))
    (folder / "copy.py").write_text(MODULE.format(number=1000))
    (folder / "site-packages" / "other.py").write_text(MODULE.format(number=2000))
    (folder / "_sysconfigdata__linux.py").write_text(MODULE.format(number=3000))
    (folder / "latin.py").write_bytes(MODULE.format(number=4000).encode() + b"# \xe9\n")
    (folder / "table.py").write_text("table = [" + "12345, " * 200 + "]\n")
    (folder / "broken.py").write_text(MODULE.format(number=5000) + "def broken(:\n")
    (folder / "LICENSE.txt").write_text("the licence\n")
    return folder


def test_corpus(stdlib_dir):
    corpus = collect_corpus(stdlib_dir, max_files=80)
    sets = [{source.path for source in files} for files in (corpus.train, corpus.validation, corpus.held_out)]
    assert all(sets)
    assert len(set.union(*sets)) == sum(len(paths) for paths in sets) == 80
    assert collect_corpus(stdlib_dir, max_files=80) == corpus
    assert corpus.license_text == "the licence\n"


def test_corpus_leaves_out_what_is_no_source_of_the_library(stdlib_dir):
    corpus = collect_corpus(stdlib_dir)
    paths = {source.path for files in (corpus.train, corpus.validation, corpus.held_out) for source in files}
    assert not paths & {"site-packages/other.py", "_sysconfigdata__linux.py", "latin.py", "table.py"}
    assert len(paths & {"os.py", "copy.py"}) == 1  # one text under two names


def test_documents_hold_chats(stdlib_dir):
    corpus = collect_corpus(stdlib_dir, max_files=80)
    documents = training_documents(corpus.train, seed=1)
    assert documents == training_documents(corpus.train, seed=1) != training_documents(corpus.train, seed=2)
    chat = next(document for document in documents if "Write the Python function" in document)
    assert chat.startswith("<|im_start|>user\nWrite the Python function `area_")
    assert "<|im_end|>\n<|im_start|>assistant\ndef area_" in chat
    assert chat.endswith("<|im_end|>\n")


def test_folder_that_is_no_library(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no os\.py"):
        collect_corpus(tmp_path)
    (tmp_path / "os.py").touch()
    with pytest.raises(FileNotFoundError, match="notice"):
        collect_corpus(tmp_path)


def test_smoke_run(stdlib_dir, tmp_path):
    from qwen_model import build_engine, load_engine

    output_dir = tmp_path / "model"
    main(["--smoke", "--steps", "3", "--stdlib-dir", str(stdlib_dir), "--output-dir", str(output_dir)])
    record = json.loads((output_dir / "training.json").read_text())
    assert record["recipe"]["steps"] == 3
    assert record["perplexity"]["held_out"]["perplexity_per_token"] < 512
    build_engine(output_dir, output_dir=tmp_path / "engine", max_input_len=64, max_output_len=16)
    assert load_engine(tmp_path / "engine", device="cpu").generate("def", max_new_tokens=4).outputs
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    with pytest.raises(SystemExit, match="already exists"):
        main(["--smoke", "--output-dir", str(output_dir)])
