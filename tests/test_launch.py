"""The launch scripts by their dry runs, and the Accelerate configurations by Accelerate's own reader."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cfpo_trl.grpo import recipe_parser

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts" / "launch"
RECIPE = "recipes/demo/config_cfpo.yaml"
CONFIGS = sorted((ROOT / "recipes" / "accelerate_configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*/**/config_cfpo*.yaml"))


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [str(SCRIPTS / script), *arguments],
        cwd=ROOT,
        env=os.environ | {"DRY_RUN": "1"} | environment,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return [line.strip().replace("\\", "") for line in result.stdout.splitlines()]


def test_shellcheck():
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    scripts = [*SCRIPTS.glob("train.*"), SCRIPTS / "serving.sh", SCRIPTS / "verl_math.sh"]
    result = subprocess.run([checker, "-x", *map(str, scripts)], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout


def test_one_node():
    assert dry_run("train.sh", RECIPE, "--epsilon", "0.1", GPUS="8", ENGINE="zero3") == [
        f"cfpo train --engine zero3 --num_processes 8 --config {RECIPE} --epsilon 0.1"
    ]


def test_one_node_with_a_server():
    served = f"--config {RECIPE} --use_vllm true --vllm_mode server --vllm_server_host 127.0.0.1"
    assert dry_run("train.sh", RECIPE, GPUS="8", SERVER_GPUS="2") == [
        f"env CUDA_VISIBLE_DEVICES=6,7 cfpo serve {served}",
        f"cfpo serve --wait 900 {served}",
        f"env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 cfpo train --engine ddp --num_processes 6 {served}",
    ]


def test_a_server_for_an_asynchronous_recipe():
    recipe = "recipes/Qwen2.5-1.5B-Instruct/math/config_cfpo_async.yaml"
    for command in dry_run("train.sh", recipe, "--vllm_server_port", "8123", GPUS="2", SERVER_GPUS="1"):
        arguments = command[command.index("--config") :].split()
        on_cpu = ["--bf16", "false", "--use_cpu", "true"]
        script_args, args, *_ = recipe_parser([*arguments, *on_cpu]).parse_args_and_config([*arguments, *on_cpu])
        assert script_args.rollouts == "async"
        assert args.vllm_server_base_url == "http://127.0.0.1:8123"


def test_several_nodes():
    (command,) = dry_run("train.sh", RECIPE, GPUS="8", NODES="2", NODE_RANK="1", MAIN_ADDRESS="node0")
    assert "--num_processes 16 --num_machines 2 --machine_rank 1" in command
    assert "--main_process_ip node0 --main_process_port 29500" in command


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage"),
        ([RECIPE], {"GPUS": "2", "SERVER_GPUS": "2"}, "leaves none of 2 GPUs to train on"),
        ([RECIPE], {"GPUS": "2", "NODES": "2"}, "which of the 2 nodes is this"),
        ([RECIPE], {"GPUS": "8", "NODES": "2", "SERVER_GPUS": "1"}, "train.slurm gives the server a node"),
    ],
)
def test_refusals(arguments, environment, message):
    environment = os.environ | {"DRY_RUN": "1"} | environment
    result = subprocess.run([str(SCRIPTS / "train.sh"), *arguments], env=environment, text=True, capture_output=True)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.fixture
def slurm(tmp_path):
    """SLURM's variables, and a `scontrol` that expands the node list, which only a cluster has."""

    def make(*hosts: str) -> dict[str, str]:
        scontrol = tmp_path / "scontrol"
        scontrol.write_text("#!/bin/sh\n" + "".join(f"echo {host}\n" for host in hosts))
        scontrol.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return {"PATH": path, "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_GPUS_ON_NODE": "4"}

    return make


def test_slurm(slurm):
    served = f"--config {RECIPE} --epsilon 0.1 --use_vllm true --vllm_mode server --vllm_server_host n1"
    serve, wait, train = dry_run("train.slurm", RECIPE, "--epsilon", "0.1", ENGINE="zero3", **slurm("n1", "n2", "n3"))
    assert serve == f"srun --nodes=1 --ntasks=1 --nodelist=n1 cfpo serve {served}"
    assert wait == f"cfpo serve --wait 900 {served}"
    assert train.startswith(
        "env NODES=2 MAIN_ADDRESS=n2 ENGINE=zero3 GPUS=4 srun --nodes=2 --ntasks=2 --nodelist=n2,n3"
    )
    assert train.endswith(f"{RECIPE} " + served.partition(f"{RECIPE} ")[2])


def test_slurm_needs_a_node_to_train_on(slurm):
    environment = os.environ | slurm("n1") | {"DRY_RUN": "1"}
    result = subprocess.run([str(SCRIPTS / "train.slurm"), RECIPE], env=environment, text=True, capture_output=True)
    assert result.returncode == 2
    assert "1 node: one must serve" in result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_accelerate_reads_the_configuration(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    on_cpu = path.parent.name == "cpu"
    assert config.use_cpu == on_cpu
    assert config.num_processes == (2 if on_cpu else 8)
    assert "mixed_precision" not in yaml.safe_load(path.read_text())  # the recipe's bf16 alone decides


def test_every_engine_has_a_configuration():
    names = {str(path.relative_to(ROOT / "recipes" / "accelerate_configs")) for path in CONFIGS}
    assert {"ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"} <= names
    assert {"cpu/ddp.yaml", "cpu/zero2.yaml", "cpu/zero3.yaml"} <= names  # FSDP2 on a CPU: tests/scale


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_fits_any_number_of_processes(path):
    """The batch of rollouts holds whole groups on 1 to 64 processes, and no engine is asked for twice what it does."""
    recipe = yaml.safe_load(path.read_text())
    steps = recipe.get("steps_per_generation") or recipe.get("gradient_accumulation_steps", 1)
    for processes in (1, 2, 4, 8, 16, 64):
        assert recipe["per_device_train_batch_size"] * steps * processes % recipe["num_generations"] == 0
    assert not {"fsdp", "fsdp_config", "deepspeed"} & recipe.keys()  # the Accelerate configuration's business
