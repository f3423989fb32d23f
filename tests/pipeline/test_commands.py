"""Commands as a user meets them first: help at once, with examples."""

import subprocess
import sys

COMMANDS = ("embed", "evaluate", "export", "fill_mask", "finetune", "generate", "look", "rehearse", "score")
HEAVY = ("torch", "transformers", "deepspeed", "tensorboard", "PIL")


def test_help_has_examples_and_imports_nothing_heavy():
    """All commands in one process, as a superset of what any of them imports."""
    code = (
        "import importlib, sys\n"
        f"for name in {COMMANDS!r}:\n"
        "    try: importlib.import_module(f'pipeline.{name}').main(['--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        f"print('imported', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "imported []\n"
    for name, shown in zip(COMMANDS, done.stdout.split("usage: python -m pipeline.")[1:], strict=True):
        assert shown.startswith(f"{name} ")
        assert f"python -m pipeline.{name} " in shown.split("examples:")[1]
        assert "%(" not in shown
