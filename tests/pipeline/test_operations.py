"""What docs/operations.md says of clusters can be typed: flags and files are there, and who runs a command is true."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.arguments import parse_arguments
from pipeline.configuration import resolve

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "docs" / "kubernetes").glob("*.yaml"))


def cluster_commands() -> list[tuple[str, str]]:
    """(the comment above it, command) of every command in the section's blocks; a block's first comment is needed."""
    section = re.search(r"^## Clusters\n(.*?)^## ", (ROOT / "docs" / "operations.md").read_text(), re.M | re.S)[1]
    found = []
    for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S):
        comment = ""
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("# "):
                comment = line.removeprefix("# ")
            elif not line.startswith("#SBATCH"):
                found.append((comment, " ".join(line.split())))
    return found


def test_every_command_is_run_by_a_test_or_says_that_it_is_not():
    commands = cluster_commands()
    assert len(commands) > 6
    for comment, command in commands:
        if comment.startswith("not run here"):
            continue
        path, _, name = comment.partition(" ")[0].partition("::")
        functions = {
            node.name: ast.get_source_segment((ROOT / path).read_text(), node) or ""
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{command}: no test {comment}"
        program = command.split()[0]
        assert program in (ROOT / path).read_text()


@pytest.mark.parametrize("command", [found for _, found in cluster_commands() if "pretrain.py" in found])
def test_the_flags_of_a_command_are_ours_and_its_files_are_there(command):
    flags = shlex.split(command.partition("pipeline/pretrain.py")[2])
    arguments = parse_arguments([flag for flag in flags if flag != "..."])
    assert (ROOT / arguments.recipe).is_file() and (ROOT / arguments.deepspeed_config).is_file()


def containers(manifest: dict) -> list[dict]:
    """The containers of each kind of pod that a manifest makes."""
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        pods = [job["template"]["spec"]["template"]["spec"] for job in spec["replicatedJobs"]]
    else:
        pods = [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]
    return [container for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_starts_what_its_flags_say(path, monkeypatch):
    """Its command line parses as torchrun's and as ours, recipe and ds_config fit together, and all that is mounted is
    declared."""
    from torch.distributed.run import parse_args

    monkeypatch.chdir(ROOT)
    manifest = yaml.safe_load(path.read_text())
    assert manifest["kind"] in ("JobSet", "PyTorchJob")
    found = containers(manifest)
    assert len(found) == (1 if manifest["kind"] == "JobSet" else 2)
    for container in found:
        program, *words = container["command"]
        assert program == "torchrun" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
        for variable in container.get("env", []):
            monkeypatch.setenv(variable["name"], variable.get("value", "1"))
        torchrun = parse_args(words)
        assert torchrun.training_script == "pipeline/pretrain.py"
        if manifest["kind"] == "JobSet":
            assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "8", 1)
            job = manifest["spec"]["replicatedJobs"][0]
            name = manifest["metadata"]["name"]
            assert torchrun.master_addr == f"{name}-{job['name']}-0-0.{name}"
            assert job["template"]["spec"]["completions"] == int(torchrun.nnodes)
        arguments = parse_arguments(torchrun.training_script_args)
        recipe, _ = resolve(arguments.recipe, arguments.overrides, arguments.deepspeed_config)
        assert str(recipe.data.shards).startswith("/shared/") and str(arguments.output_dir).startswith("/shared/")
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}


def test_each_kind_of_manifest_is_there():
    assert [path.stem for path in MANIFESTS] == ["jobset", "pytorchjob"]
