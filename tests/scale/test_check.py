"""`cfpo check` with DeepSpeed and vLLM: the parts that need them, on the CPU."""

import json
import os
import subprocess
import sys

PARTS = ["2 processes, ZeRO-2", "vLLM, colocated", "vLLM, server", "asynchronous"]


def test_the_parts_with_deepspeed_and_vllm_pass(tmp_path):
    command = [sys.executable, "-m", "cfpo_trl.cli", "check", "--out", str(tmp_path), "--parts", *PARTS]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = json.loads((tmp_path / "check.json").read_text())["results"]
    assert [(result["part"], result["status"]) for result in results] == [(part, "passed") for part in PARTS], results
    assert done.returncode == 0
