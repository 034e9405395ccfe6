"""The tools are scripts of the repository, no installed package: found from its root, however pytest was started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
