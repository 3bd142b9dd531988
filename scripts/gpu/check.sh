#!/usr/bin/env bash
# `cfpo check` from this checkout and gpu-bundle, which scripts/gpu/bundle.sh made: no network, nothing is installed into
# the machine's Python. Options are those of `cfpo check`.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" gpu-bundle/*.whl
PYTHONPATH="$PWD/src:$site" python3 -m cfpo_trl.cli check "$@"
