"""Let tests import tools, which are scripts of the repository, however pytest was started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
