"""One module per back end; see `qwen_model.network.decoder.Operations` and `qwen_model.interface.executor.Executor`."""
