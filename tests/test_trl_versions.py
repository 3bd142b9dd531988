"""The loss tests on other TRL versions, each installed by this test beside the rest of the tested set."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
VERSIONS = ["1.0.0", "1.4.0", "1.8.0", "1.10.0", "1.12.0", "1.14.0", "1.16.0"]


def test_the_range_of_setup_py_is_what_is_tested():
    requirement = next(r for r in map(Requirement, metadata.requires("cfpo_trl")) if r.name == "trl")
    oldest, newest = Version(VERSIONS[0]), Version(VERSIONS[-1])
    assert requirement.specifier == Requirement(f"trl>=1.0,<{newest.major}.{newest.minor + 1}").specifier
    assert oldest == Version("1.0.0")
    assert trl.__version__ == VERSIONS[-1]  # the tested set has the newest


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_loss_metrics_refusals_and_the_script(version):
    packages = ROOT / ".venvs" / f"trl-{version}"
    if not packages.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*install, f"trl=={version}"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, "-m", "pip", "check"], env=environment, check=True)  # trl's own requirements hold
    installed = [sys.executable, "-c", "import trl; print(trl.__version__)"]
    assert subprocess.check_output(installed, env=environment, text=True).strip() == version

    tests = ["tests/test_loss.py", "tests/test_trainer.py", "tests/test_grpo_script.py"]
    tests += ["tests/test_alignment.py", "tests/test_reward_models.py", "-k"]
    tests += ["oracle or refused or one_recipe or definitions or alignment or learns or several_models"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    print(version, result.stdout.splitlines()[-1])
