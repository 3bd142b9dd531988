"""The command `cfpo`, the recipes that it lists, and what a wheel holds."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import yaml

from cfpo_trl import cli
from cfpo_trl.mistakes import Mistake
from cfpo_trl.running import catalogue
from cfpo_trl.running.group import run_in_group

ROOT = Path(__file__).parent.parent
CFPO = Path(sys.executable).with_name("cfpo")


def cfpo(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([CFPO, *arguments], capture_output=True, text=True, **options)


def test_help_lists_every_command_in_an_instant():
    code = "import sys; from cfpo_trl.cli import run; run([]); assert not {'torch', 'accelerate'} & set(sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
    assert cfpo("--help").stdout == shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_function(name):
    module, function = cli.COMMANDS[name][0].split(":")
    assert callable(getattr(__import__(f"cfpo_trl.{module}", fromlist=[function]), function))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: 'trian' is no command (did you mean 'train'?); `cfpo --help` lists them."),
        (["train", "--config", "nowhere.yaml"], "error: --config nowhere.yaml: there is no such file."),
        (
            ["train", "--config", "demo/config_cpfo"],
            "error: --config demo/config_cpfo: there is no such file (did you mean 'demo/config_cfpo'?).",
        ),
        (
            ["train", "--engine", "zero4", "--config", "demo/config_cfpo"],
            "error: --engine zero4: there is none (did you mean 'zero3'?); use one of cpu/ddp, ",
        ),
        (["recipes", "demo/config_cfp"], "error: 'demo/config_cfp' is no recipe (did you mean 'demo/config_cfpo'?)"),
        (["study", "nowhere.yaml"], "error: [Errno 2] No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    result = cfpo(*arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith(message)


def test_recipes_are_listed_and_copied(tmp_path):
    listed = cfpo("recipes").stdout
    for path in (ROOT / "recipes").glob("*/**/config*.yaml"):
        assert str(path.relative_to(ROOT / "recipes").with_suffix("")) in listed
    assert cfpo("recipes", "demo/config_cfpo", cwd=tmp_path).stdout == "demo-config_cfpo.yaml\n"
    copied = (tmp_path / "demo-config_cfpo.yaml").read_text()
    assert copied == (ROOT / "recipes" / "demo" / "config_cfpo.yaml").read_text()
    with pytest.raises(Mistake, match="is there already"):
        catalogue.copy("demo/config_cfpo", tmp_path / "demo-config_cfpo.yaml")


def test_rewards_of_the_user_s_own_are_found_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    options = ["--reward_funcs", "mine.reward", "--model_name_or_path", "./nowhere", "--dataset_name", "./rows.jsonl"]
    result = cfpo("train", *options, cwd=tmp_path)
    assert "'./nowhere'" in result.stderr.splitlines()[-1]  # that comes after the rewards


def test_the_launch_waits_for_what_outlives_the_launcher(tmp_path):
    done = tmp_path / "done"
    code = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 1; touch {done}'])"
    assert run_in_group([sys.executable, "-c", code]) == 0
    assert done.exists()


START = """
import sys
from cfpo_trl.running.group import run_in_group
sys.exit(run_in_group([sys.executable, *sys.argv[1:]]))
"""
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", ["launcher", "command"])
def test_nothing_outlives_a_launcher_or_a_command_that_is_killed(killed):
    """The rank has a session of its own, as torch's have, and does not watch its launcher yet."""
    command = subprocess.Popen([sys.executable, "-c", START, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    rank = psutil.Process(int(command.stdout.readline()))
    launcher = rank.parent()
    assert launcher.parent().pid == command.pid
    (launcher if killed == "launcher" else command).kill()
    command.wait(20)
    gone, _ = psutil.wait_procs([launcher], timeout=20)
    assert gone
    if killed == "launcher":
        assert command.returncode == 128 + 9
        assert not rank.is_running()
    else:
        rank.kill()  # a real one ends with its launcher


def test_what_a_killed_server_has_left_is_killed_where_it_is_deaf():
    deaf = LAUNCHER.replace('"import time;', '"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);')
    start = START.replace("*sys.argv[1:]])", "*sys.argv[1:]], grace=1.0)")
    command = subprocess.Popen([sys.executable, "-c", start, "-c", deaf], stdout=subprocess.PIPE, text=True)
    engine = psutil.Process(int(command.stdout.readline()))
    time.sleep(1)
    engine.parent().kill()
    assert command.wait(20) == 128 + 9
    assert not engine.is_running()


def test_a_process_ends_with_its_parent_also_where_that_has_ended_before():
    child = (
        "import sys, time; from cfpo_trl.running.parent import end_with_parent; time.sleep(2);"
        "end_with_parent(int(sys.argv[1])); time.sleep(60)"
    )
    code = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]).wait()"
    for seconds in (0, 4):  # before it is asked, and while the child sleeps
        parent = psutil.Popen([sys.executable, "-c", code, child])
        while not (children := parent.children()):
            time.sleep(0.05)
        time.sleep(seconds)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_the_wheel_holds_recipes_engines_and_pins(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"  # a build leaves files in the source
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(copy)], check=True, env=os.environ)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"cfpo_trl/recipes/{path.relative_to(ROOT / 'recipes')}" in names
        assert yaml.safe_load(path.read_text())
    assert {"cfpo_trl/py.typed", "cfpo_trl/evaluation/constraints.txt", "cfpo_trl/studies/run.py"} <= names


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("benchmark*.py")), ids=lambda path: path.stem)
def test_every_benchmark_starts(script):
    assert "usage" in subprocess.check_output([sys.executable, script, "--help"], text=True)
