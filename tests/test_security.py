"""What docs/security.md claims."""

import ast
import json
import pickle
import re
import socket
from http.server import ThreadingHTTPServer
from pathlib import Path

import math_verify.parser
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from trl import ModelConfig

from cfpo_trl import CFPOConfig, grpo
from cfpo_trl.rewards import serve
from cfpo_trl.rollouts.server import serve_command
from test_existing_run import output, run  # noqa: F401 (fixtures)
from test_grpo_script import module, recipe  # noqa: F401

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "127.0.0.1"),
        ({"vllm_server_host": "0.0.0.0"}, "127.0.0.1"),
        ({"vllm_server_host": "node7"}, "node7"),
        ({"vllm_server_base_url": "http://10.0.0.7:8000"}, "10.0.0.7"),
    ],
)
def test_the_rollout_server_listens_on_this_machine_unless_the_recipe_names_another(options, host, tmp_path):
    args = CFPOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", bf16=False, **options)
    command = serve_command(args, ModelConfig(model_name_or_path="m"), 8)
    assert command[command.index("--host") + 1] == host


def test_the_reward_server_listens_on_this_machine(monkeypatch):
    bound = []

    class Listening(ThreadingHTTPServer):
        def serve_forever(self) -> None:
            bound.append(self.server_address)
            self.server_close()

    monkeypatch.setattr(serve, "ThreadingHTTPServer", Listening)
    monkeypatch.setattr(serve, "RewardModel", lambda *arguments: None)
    serve.main(["a-model", "--port", "0"])
    assert [host for host, _ in bound] == ["127.0.0.1"]


PIECES = [
    *("1", "23", ".5", "(", ")", "+", "-", "*", "/", "^", "÷", "×", " ", "=", ",", "$", "%", "_", "**", "\n"),
    *("answer: ", "final answer is ", "\\boxed{", "}", "\\frac"),
    *("__import__('os')", "lambda: 0", "x", "abs", "[1]", "{}", "'", '"', "e"),
]


def test_of_a_completion_only_digits_and_operators_are_evaluated(monkeypatch):
    """math-verify hands plain expressions to sympy's `parse_expr`, which evaluates Python."""
    seen = set()
    monkeypatch.setattr(math_verify.parser, "parse_expr_cached", lambda text: seen.add(text))

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join))
    def look(completion: str) -> None:
        parse(completion, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)

    look()
    parse("the answer: 1+2", [ExprExtractionConfig()], parsing_timeout=None)
    assert seen, "nothing reached it: math-verify has another way now"
    assert {text for text in seen if not re.fullmatch(r"[\d\s.+\-*/()×÷]*", text)} == set()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_runs_no_code(name, run, output, tmp_path):  # noqa: F811
    run("--max_steps", "2")
    made = tmp_path / "made"
    (output / "checkpoint-2" / name).write_bytes(b"")
    torch.save(Touch(made), output / "checkpoint-2" / name)
    with pytest.raises((pickle.UnpicklingError, grpo.Mistake, SystemExit)):
        run("--max_steps", "4", "--if_output_exists", "continue")
    assert not made.exists()
    torch.load(output / "checkpoint-2" / name, weights_only=False)  # it would have
    assert made.exists()


def test_a_model_s_own_code_does_not_run(recipe, tmp_path, tokenizer):  # noqa: F811
    folder, made = tmp_path / "own", tmp_path / "made"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
        )
    )
    (folder / "mine.py").write_text(f"import pathlib; pathlib.Path({str(made)!r}).touch()\nclass Mine: pass\n")
    with pytest.raises((grpo.Mistake, ValueError), match="trust_remote_code"):
        grpo.main(["--config", str(recipe), "--model_name_or_path", str(folder)])
    assert not made.exists()


def calls(source: Path) -> set[str]:
    """The dotted names that a file calls."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_no_source_unpickles_loads_yaml_objects_or_starts_a_shell():
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "os.system", "eval", "exec"}
    found = {source.relative_to(ROOT): calls(source) & forbidden for source in SOURCES}
    in_the_sandbox = Path("src/cfpo_trl/rewards/sandbox.py")  # which is what runs programs
    assert {path: names for path, names in found.items() if names and path != in_the_sandbox} == {}
    assert not [source for source in SOURCES if "shell=True" in source.read_text(encoding="utf-8")]


def test_training_opens_no_port_and_reaches_no_host(run, monkeypatch):  # noqa: F811
    reached, connect = [], socket.socket.connect

    def noted(self: socket.socket, address: object) -> None:
        reached.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    bound, bind = [], socket.socket.bind

    def noted_bind(self: socket.socket, address: object) -> None:
        bound.append(address)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", noted_bind)
    run("--max_steps", "2")
    assert [address for address in reached + bound if isinstance(address, tuple)] == []


def test_every_pinned_package_has_hashes():
    pinned = re.findall(r"^([\w.-]+==\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    locked = re.split(r"^(?=\w)", (ROOT / ".github" / "constraints-hashes.txt").read_text(), flags=re.MULTILINE)[1:]
    names = {re.sub(r"[-_.]+", "-", entry.split(" ")[0]).lower() for entry in locked}
    assert names == {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert all("--hash=sha256:" in entry for entry in locked)
