"""Random recipes, data, completions and servers' answers: one message each, no traceback, no hang.

FUZZ=20 pytest tests/test_fuzz.py     twenty times as many as by default
"""

import json
import math
import os
import random
import threading
import time
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cfpo_trl import CFPOTrainer, grpo
from cfpo_trl.mistakes import Mistake
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards.pool import Limits
from cfpo_trl.rewards.registry import REWARDS as BUILT_IN
from cfpo_trl.rewards.remote import RewardServer
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.tiny.model import build_model
from conftest import CPU, LETTERS

TIMES = float(os.environ.get("FUZZ", "1"))
PATIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
LONGEST = 20.0  # seconds for one recipe or dataset


def examples(count: int) -> settings:
    return settings(max_examples=int(count * TIMES), **PATIENT)


class Loaded(Exception):
    """The script went as far as loading the model."""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A recipe that trains, as a mapping; and its folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    build_model(tokenizer, hidden_size=32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": letter, "solution": "7"} for letter in LETTERS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "dtype": "float32",
        "dataset_name": str(folder / "data.jsonl"),
        "reward_funcs": ["accuracy"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        **CPU,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    }
    return recipe, folder


def outcome(recipe: dict, folder: Path) -> str:
    """`mistake` or `loaded`: the model would be loaded now. What else a recipe leads to is raised: a defect."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")

    def loaded(**options: Any) -> CFPOTrainer:
        raise Loaded

    start = time.monotonic()
    try:
        grpo.main(["--config", str(file)], trainer_class=loaded)
    except Loaded:
        found = "loaded"
    except Mistake as mistake:
        found = "mistake" if str(mistake).strip() else "an empty message"
    else:
        found = "it ended without a word"
    assert found in ("loaded", "mistake")
    assert time.monotonic() - start < LONGEST
    return found


OPTIONS = sorted(
    {action.dest for action in grpo.recipe_parser([])._actions}
    - {"help", "config", "model_name_or_path", "hub_token", "push_to_hub", "local_rank", "deepspeed"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**12, -(10**30), 0.5, -0.1, 1e300, math.nan, math.inf, "", " ", "none", "auto", "0x10"])
    | st.text("ab{}[]:.,\0é\n \"'", max_size=6)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)


def test_recipes_with_options_of_any_value(base, capsys):
    recipe, folder = base
    seen = Counter()

    @examples(120)
    @given(st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=2))
    def look(changes: dict) -> None:
        seen[outcome(recipe | changes, folder)] += 1

    look()
    assert min(seen["mistake"], seen["loaded"]) > 0


CELLS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["7", "\\boxed{7}", "\0", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "x" * 100_000]
    )
    | st.lists(st.text(max_size=3), max_size=2)
    | st.just([{"role": "user", "content": "1 + 6?"}])
    | st.just([{"role": "nobody"}])
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "solution", "other", "tools", ""]), CELLS, min_size=1, max_size=3)
    | st.just({"prompt": "a", "solution": "7"}),
    min_size=1,
    max_size=5,
)


def test_datasets_of_any_rows(base):
    recipe, folder = base
    seen = Counter()

    @examples(60)
    @given(ROWS, st.sampled_from(["utf-8", "utf-16", "latin-1"]), st.booleans())
    def look(rows: list[dict], encoding: str, cut: bool) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = folder / f"{sha256(text.encode()).hexdigest()[:12]}-{encoding}-{cut}.jsonl"
        file.write_bytes(text[: len(text) - 2 * cut].encode(encoding, "replace"))
        seen[outcome(recipe | {"dataset_name": str(file), "max_prompt_length": 64}, folder)] += 1

    look()
    assert min(seen["mistake"], seen["loaded"]) > 0


SIGNS = ["+", "-", "\\cdot ", "^", "=", ",", "\\le ", "\\cup ", ""]
LATEX = st.recursive(
    st.sampled_from([*"0123456789xyneπ%°", ".", "10^{10}", "\\infty", "\\text{cm}", "\\%", "1{,}000", "\\varnothing"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "\\cdot ", "^", "=", ",", "\\le ", "\\cup ", ""]), inner).map(
            "".join
        ),
        st.tuples(inner, inner).map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"),
        inner.map(lambda text: f"\\sqrt{{{text}}}"),
        inner.map(lambda text: f"\\left({text}\\right)"),
        inner.map(lambda text: f"\\begin{{pmatrix}}{text}&1\\\\{text}&2\\end{{pmatrix}}"),
        inner.map(lambda text: f"{{{text}}}^{{{text}}}"),
    ),
    max_leaves=12,
)
REAL = [
    "<think>\nSix and one is seven.\n</think>\n<answer>\n\\boxed{7}\n</answer>",
    "First, $x^2 = 49$. Second, $x = \\pm 7$. The final answer is $\\boxed{x = 7}$. I hope it is correct.",
    "```python\nprint(7)\n```",
    "Answer: 7 apples, or \\boxed{\\frac{14}{2}}",
]


def mutated(draw: random.Random) -> str:
    """A real completion with a few pieces cut out, doubled, exchanged or filled with other characters."""
    text = draw.choice(REAL)
    for _ in range(draw.randint(1, 4)):
        start, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        piece = draw.choice(["", text[start:end] * 2, "{" * 9, "\\", "\0", "9" * 400, "é", text[end:start:-1]])
        text = text[:start] + piece + text[end:]
    return text


PARAMETERS = {"cosine": {"max_len": 1000}, "repetition_penalty": {"ngram_size": 3, "max_penalty": -1.0}}
REWARDS = sorted(set(BUILT_IN) - {"code", "soft_overlong"})  # programs have tests of their own; that one reads ids


def test_completions_of_any_kind_are_scored_in_time_by_every_reward():
    """Half from a grammar of LaTeX, half mutations of real ones; 10,000 with FUZZ=40."""
    made: list[str] = []

    @settings(examples(125), phases=[Phase.generate], database=None)
    @given(LATEX)
    def make(text: str) -> None:
        made.append(f"So it is $\\boxed{{{text}}}$.")

    make()
    draw = random.Random(0)
    completions = made + [mutated(draw) for _ in range(len(made))]
    for name in REWARDS:
        reward = load_reward(name, PARAMETERS.get(name))
        start = time.monotonic()
        scores = reward(
            prompts=["?"] * len(completions),
            completions=completions,
            completion_ids=[[1] * len(completion) for completion in completions],
            solution=["7"] * len(completions),
        )
        spent = time.monotonic() - start
        assert len(scores) == len(completions), name
        assert all(score is None or math.isfinite(score) for score in scores), name
        assert spent < Limits().budget + 10, (name, spent)


ANSWERS = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["rewards", "error", "x"]), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.lists(st.none() | st.booleans() | st.floats() | st.integers(), min_size=2, max_size=2).map(
        lambda rewards: json.dumps({"rewards": rewards}).encode()
    ),
)


def test_answers_of_a_reward_server_are_rewards_or_a_reason():
    answer: dict[str, Any] = {"status": 200, "body": b"{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reward = RewardServer(f"http://127.0.0.1:{server.server_port}", retries=0, timeout=5)
    seen = Counter()

    @examples(150)
    @given(st.sampled_from([200, 200, 200, 204, 400, 404, 418, 500]), ANSWERS)
    def look(status: int, body: bytes) -> None:
        answer.update(status=status, body=body)
        try:
            scores = reward(["a", "b"], ["c", "d"])
        except RewardError as error:
            assert str(error).startswith("Reward server http://127.0.0.1")  # noqa: PT017
            seen["reason"] += 1
            return
        assert status == 200
        assert [type(score) for score in scores] == [type(score) for score in json.loads(body)["rewards"]]
        assert all(score is None or math.isfinite(score) for score in scores)
        seen["rewards"] += 1

    look()
    server.shutdown()
    assert min(seen["reason"], seen["rewards"]) > 0
