"""Define what engines and back ends share: the engine's configuration, sampling options and protocols."""
