"""Collect the training text of the packaged model: the sources of Python's standard library.

CPython's sources may be used and redistributed under the PSF licence, whose text is shipped with the model.
Which files are for training, validation and held-out evaluation depends only on the hashes of their paths,
so every run over one Python version makes the same three sets.
"""

import ast
import hashlib
import random
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qwen_model.checkpoints.qwen_tiktoken import CHAT_END, CHAT_START, END_OF_TEXT

SPECIAL_TOKENS = (END_OF_TEXT, CHAT_START, CHAT_END)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload", "cjkencodings"}
EVALUATION_BYTES = 200_000
LONGEST_EVALUATION_FILE = 32_000
LONGEST_CHAT_ANSWER = 2_000


@dataclass(frozen=True)
class SourceFile:
    """A SourceFile is one file of the corpus: its path in the standard library, its bytes' digest and its text."""

    path: str
    sha256: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Return the length of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """A Corpus holds three disjoint sets of files and the notice they are under."""

    train: list[SourceFile]
    validation: list[SourceFile]
    held_out: list[SourceFile]
    license_text: str

    def checksums(self) -> str:
        """List every file in the format of ``sha256sum``, under a heading for the set that it is in."""
        lines = []
        for name in ("train", "validation", "held_out"):
            lines.append(f"# {name}")
            lines += [f"{source.sha256}  {source.path}" for source in getattr(self, name)]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """Return the SHA-256 of ``checksums()``."""
        return hashlib.sha256(self.checksums().encode()).hexdigest()


def collect_corpus(stdlib_dir: Path, max_files: int | None = None) -> Corpus:
    """Read the standard library in ``stdlib_dir`` and split it; ``max_files`` limits it for a smoke run.

    Raises:
        FileNotFoundError: ``stdlib_dir`` holds no standard library, or no licence file.
    """
    if not (stdlib_dir / "os.py").is_file():
        raise FileNotFoundError(f"{stdlib_dir} is not a Python standard library: it has no os.py")
    license_path = stdlib_dir / "LICENSE.txt"
    if not license_path.is_file():
        raise FileNotFoundError(f"{license_path} does not exist: the notice has to be shipped with the model")
    files = _unique(_read_sources(stdlib_dir))
    files.sort(key=lambda source: hashlib.sha256(source.path.encode()).digest())
    evaluation_bytes = EVALUATION_BYTES
    if max_files is not None:
        files, evaluation_bytes = files[:max_files], 20_000
    held_out, files = _take(files, evaluation_bytes)
    validation, files = _take(files, evaluation_bytes)
    return Corpus(files, validation, held_out, license_path.read_text(encoding="utf-8"))


def _read_sources(stdlib_dir: Path) -> list[SourceFile]:
    files = []
    for path in sorted(stdlib_dir.rglob("*.py")):
        relative = path.relative_to(stdlib_dir)
        # _sysconfigdata and config-* describe one machine.
        if SKIPPED_FOLDERS & set(relative.parts) or str(relative).startswith(("_sysconfigdata", "config-")):
            continue
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if _is_prose_or_code(text):
            files.append(SourceFile(relative.as_posix(), hashlib.sha256(data).hexdigest(), _clean(text)))
    return files


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.removeprefix("\ufeff").replace("\r\n", "\n"))


def _is_prose_or_code(text: str) -> bool:
    """Tell whether a text is prose or code, and not nearly empty, a table of numbers or embedded data."""
    if len(text) < 300 or any(token in text for token in SPECIAL_TOKENS):
        return False
    letters_and_space = sum(character.isalpha() or character.isspace() for character in text)
    not_ascii = sum(not character.isascii() for character in text)
    longest_line = max(len(line) for line in text.splitlines())
    return letters_and_space > 0.6 * len(text) and not_ascii < 0.05 * len(text) and longest_line < 1000


def _unique(files: list[SourceFile]) -> list[SourceFile]:
    return list({source.sha256: source for source in reversed(files)}.values())


def _take(files: list[SourceFile], num_bytes: int) -> tuple[list[SourceFile], list[SourceFile]]:
    """Return the first files that are not too long, until they hold ``num_bytes``, and the rest."""
    taken: list[SourceFile] = []
    for source in files:
        if sum(taken_file.num_bytes for taken_file in taken) >= num_bytes:
            break
        # topics.py is the language reference, all of which is for training.
        if source.num_bytes <= LONGEST_EVALUATION_FILE and not source.path.startswith("pydoc_data"):
            taken.append(source)
    chosen = {source.path for source in taken}
    return taken, [source for source in files if source.path not in chosen]


def training_documents(files: list[SourceFile], seed: int) -> list[str]:
    """Return the documents to train on, shuffled: files, the topics of the language reference, and chats."""
    documents: list[str] = []
    for source in files:
        if source.path == "pydoc_data/topics.py":
            documents += _reference_topics(source.text)
        else:
            documents.append(source.text)
            documents += chat_examples(source)
    random.Random(seed).shuffle(documents)
    return documents


def _reference_topics(text: str) -> list[str]:
    """Return the texts of ``help("assert")`` and the like, from the module that holds them as one dictionary."""
    assignment = next(node for node in ast.parse(text).body if isinstance(node, ast.Assign))
    return list(ast.literal_eval(assignment.value).values())


def chat_examples(source: SourceFile) -> list[str]:
    """Make questions and answers in ChatML of a module's documented functions and classes.

    A function's first docstring line asks for its source; a name asks for its docstring.
    """
    try:
        tree = ast.parse(source.text)
    except SyntaxError:  # the test-suite holds files that are broken on purpose
        return []
    lines = source.text.split("\n")  # not splitlines, which also splits at form feeds
    module = source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    examples = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) > LONGEST_CHAT_ANSWER:
            continue
        if isinstance(node, ast.ClassDef) or node.name.startswith("test"):
            examples.append(_chat(f"What is `{module}.{node.name}`?", docstring))
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if len(code) <= LONGEST_CHAT_ANSWER:
            first_line = docstring.splitlines()[0]
            examples.append(_chat(f"Write the Python function `{node.name}`: {first_line}", code))
        examples.append(_chat(f"What does `{module}.{node.name}` do?", docstring))
    return examples


def _chat(question: str, answer: str) -> str:
    return f"{CHAT_START}user\n{question}{CHAT_END}\n{CHAT_START}assistant\n{answer}{CHAT_END}\n"
