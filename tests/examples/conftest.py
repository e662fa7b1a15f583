"""The example is a distribution of its own: its tests run whether it is installed here or not."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples/plans_api/src"))
