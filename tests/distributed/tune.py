"""Runs several fine-tunings in one process, as `pipeline.finetune` would one by one: the start is what costs.

`tune.py COMMANDS.json`: a list of lists of flags.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from pipeline.finetune import parse_arguments, read_ds_config, run_tasks  # noqa: E402
from pipeline.interruption import Interruption  # noqa: E402
from pipeline.startup import init_distributed, leave, set_environment  # noqa: E402

if __name__ == "__main__":
    set_environment()
    commands = [parse_arguments(flags) for flags in json.loads(Path(sys.argv[1]).read_text())]
    configs = [read_ds_config(arguments) for arguments in commands]
    world = init_distributed()
    for arguments, (ds_config, source) in zip(commands, configs, strict=True):
        run_tasks(arguments, ds_config, source, world, Interruption())
    world.close()
    leave(0)
