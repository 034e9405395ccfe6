"""Make files misbehave."""

import os
from pathlib import Path


def redirect(name: str, target: str) -> None:
    """Let what is written to the open file of that name go to another file."""
    for number in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", number)
        if link.is_symlink() and os.readlink(link).endswith(f"/{name}"):
            with open(target, "wb") as file:
                os.dup2(file.fileno(), int(number))
