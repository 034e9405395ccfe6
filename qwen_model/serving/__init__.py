"""Serve an engine over HTTP: OpenAI's API over the scheduler, the engine in a process of its own."""
