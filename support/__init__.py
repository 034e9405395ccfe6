"""Hold what tests and benchmarks share; nothing here is part of the installed package."""
