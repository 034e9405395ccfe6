"""Read Hugging Face checkpoints: configuration, weights, tokenizer, chat template."""
