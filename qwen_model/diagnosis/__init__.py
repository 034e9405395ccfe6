"""Find out what is installed on a machine and what is missing: the command `qwen-model doctor`."""
