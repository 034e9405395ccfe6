"""Reading Hugging Face checkpoints: configuration, weights, tokenizer, chat template."""
