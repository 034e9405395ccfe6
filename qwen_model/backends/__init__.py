"""Hold a package for each back end; `qwen_model.interface.back_end.BackEnd` says what it provides."""
