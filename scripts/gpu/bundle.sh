#!/usr/bin/env bash
# Gathers in the folder gpu-bundle what a machine without a network lacks for `cfpo check`, where it has Python 3.12 and
# torch, transformers, accelerate and peft: a few wheels, and the package itself; of what is optional Liger's kernels
# and bitsandbytes. Then, on that machine:
#   scripts/gpu/check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=gpu-bundle
rm -rf "$bundle"
pinned() { grep -E "^$1==" constraints.txt; }
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform any \
    --dest "$bundle" liger-kernel==0.8.5 bitsandbytes==0.50.2 \
    "$(pinned trl)" "$(pinned datasets)" "$(pinned math-verify)" "$(pinned latex2sympy2_extended)" \
    "$(pinned antlr4-python3-runtime)" "$(pinned dill)" "$(pinned multiprocess)"
du -sh "$bundle"
