"""Find which operation of which layer of an engine is wrong, and why: see docs/compare.md."""
