"""Keep the import path `qwen_model.tokenizer` of `qwen_model.checkpoints.tokenizer` working."""

from .checkpoints.tokenizer import HuggingFaceTokenizer, QwenTiktokenTokenizer, StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["HuggingFaceTokenizer", "QwenTiktokenTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]
