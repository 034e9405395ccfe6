"""One module per back end; see `qwen_model.network.Operations` and `qwen_model.executor.Executor`."""
