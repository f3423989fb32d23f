"""Runs several fine-tunings in one process, as `pipeline.finetune` would one by one: the start is what costs.

`tune.py COMMANDS.json`: a list of lists of flags. Under the launcher, or without one as a single process.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from pipeline.finetune import main  # noqa: E402
from pipeline.startup import leave  # noqa: E402

if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[-1]).read_text())
    leave(max(main(flags) for flags in commands))
