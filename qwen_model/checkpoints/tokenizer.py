"""Load tokenizers: Hugging Face's ``tokenizer.json`` and Qwen v1's ``qwen.tiktoken``.

transformers is not needed: importing it takes seconds, and ``tokenizers`` and ``tiktoken`` do the work.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..common.errors import QwenModelError
from ..common.files import is_file, read_json_object
from .chat_template import TEMPLATE_FILE, TEMPLATE_FOLDER, ChatOptions, load_chat_templates
from .hugging_face_tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer, load_hugging_face_tokenizer
from .qwen_tiktoken import QWEN_SPLIT_PATTERN, QwenTiktokenTokenizer, load_qwen_tiktoken
from .tokenizer_base import StreamDecoder, Tokenizer

__all__ = [
    "QWEN_SPLIT_PATTERN",
    "ChatOptions",
    "HuggingFaceTokenizer",
    "QwenTiktokenTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "copy_tokenizer_files",
    "has_tokenizer",
    "load_tokenizer",
]

QWEN_TIKTOKEN = "qwen.tiktoken"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    QWEN_TIKTOKEN,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether the folder of a checkpoint or an engine has a tokenizer."""
    return any(is_file(folder / name) for name in (TOKENIZER_JSON, QWEN_TIKTOKEN))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Return the tokenizer of the model or engine in ``model_dir``.

    Raises:
        QwenModelError: the folder holds no tokenizer, or one that cannot be read.
    """
    model_dir = Path(model_dir)
    if is_file(model_dir / TOKENIZER_JSON):
        return load_hugging_face_tokenizer(model_dir)
    if is_file(model_dir / QWEN_TIKTOKEN):
        return load_qwen_tiktoken(model_dir / QWEN_TIKTOKEN)
    message = f"{model_dir} holds no tokenizer: looked for {TOKENIZER_JSON} and {QWEN_TIKTOKEN}"
    if any(is_file(model_dir / name) for name in ("tokenizer.model", "vocab.json")):
        message += (
            f"; transformers makes {TOKENIZER_JSON} from older files: "
            "AutoTokenizer.from_pretrained(model_dir).save_pretrained(model_dir)"
        )
    raise QwenModelError(message)


def copy_tokenizer_files(model_dir: str | Path, engine_dir: str | Path) -> list[str]:
    """Copy what ``load_tokenizer`` reads, so that an engine no longer needs its checkpoint; return the files' names.

    Chat templates in files of their own become a list in the engine's ``tokenizer_config.json``. For a checkpoint
    without a tokenizer the result is empty: its engine takes token ids only.

    Raises:
        QwenModelError: a file cannot be read.
        OSError: a file cannot be copied.
    """
    source, target = Path(model_dir), Path(engine_dir)
    present = [name for name in TOKENIZER_FILES if is_file(source / name)]
    if not any((source / TEMPLATE_FOLDER).glob("*.jinja")):
        for name in present:
            shutil.copyfile(source / name, target / name)
        return present
    present = [name for name in present if name not in (TOKENIZER_CONFIG, TEMPLATE_FILE)]
    for name in present:
        shutil.copyfile(source / name, target / name)
    config = read_json_object(source / TOKENIZER_CONFIG) if is_file(source / TOKENIZER_CONFIG) else {}
    templates = load_chat_templates(source, config)
    config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    (target / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return [*present, TOKENIZER_CONFIG]
