"""The former place of `qwen_model.checkpoints.tokenizer`, kept for code that imports it."""

from .checkpoints.tokenizer import HuggingFaceTokenizer, QwenTiktokenTokenizer, StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["HuggingFaceTokenizer", "QwenTiktokenTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]
