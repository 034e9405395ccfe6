"""What an engine and a back end agree on: the engine's configuration, sampling options, the protocols."""
