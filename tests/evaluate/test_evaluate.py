"""`make evaluate` end to end, offline, on the demo's checkpoints; its scorer; what it refuses."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cfpo_trl.evaluation import compare
from cfpo_trl.evaluation.__main__ import parse, readers
from cfpo_trl.evaluation.checkpoint import CheckpointError, prepare
from cfpo_trl.evaluation.errors import EvaluationError
from cfpo_trl.evaluation.report import summarise
from cfpo_trl.evaluation.server import ServerError, serving, vllm_command
from cfpo_trl.evaluation.tasks import TaskError, TaskOptions, build_tasks
from cfpo_trl.rewards.golds import read_gold
from cfpo_trl.rollouts.health import health_problem

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "runs" / "demo"
WORDS = DEMO / "words" / "test.jsonl"
READERS = {"the evaluator": version("transformers")}
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
VLLM = ROOT / ".venvs" / "scale" / "bin" / "python"


def evaluate(model: Path | str, out: Path, *options: str, task: str = str(WORDS), check: bool = True):
    """Runs the command as the Makefile does; returns its result."""
    command = [sys.executable, "-m", "cfpo_trl.evaluation", "--model", str(model), "--task", task, "--out", str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*command, *options], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode == 0 or not check, result.stderr[-3000:]
    return result


def words(model: Path, out: Path, *options: str) -> dict:
    """The summary of the demo's task."""
    evaluate(model, out, "--metric", "exact_match", "--max-new-tokens", "6", *options)
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The demo's checkpoints before and after training, four samples for each of 200 words."""
    folder = tmp_path_factory.mktemp("sampled")
    options = ("--samples", "4", "--temperature", "1.0", "--limit", "200")
    return {name: (words(DEMO / name, folder / name, *options), folder / name) for name in ("start", "cfpo")}


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    out = tmp_path_factory.mktemp("greedy")
    return words(DEMO / "cfpo", out), out


def test_training_shows_in_the_score(sampled):
    before, after = (sampled[name][0]["tasks"][0] for name in ("start", "cfpo"))
    assert (before["n"], before["questions"]) == (4, 200)
    assert before["score"] < 0.6
    assert after["score"] > 0.85
    assert 0.005 < after["standard_error"] < 0.03
    assert 4 < after["tokens"] < 6  # three or four letters and the end


def test_samples_are_sampled(sampled):
    rows = compare.load(sampled["start"][1])["words_test"]
    assert all(len(row["completions"]) == 4 for row in rows)
    assert sum(len(set(row["completions"])) > 1 for row in rows) > 100


def test_what_is_recorded(sampled):
    summary, _ = sampled["cfpo"]
    assert len(summary["weights_sha256"]) == 64
    assert summary["weights_sha256"] != sampled["start"][0]["weights_sha256"]
    assert summary["options"]["seed"] == 0
    assert summary["options"]["temperature"] == 1.0
    assert summary["versions"].keys() == {"lighteval", "transformers", "torch"}
    assert summary["prompts"]["words_test"].endswith(">")


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_greedy_is_that_of_the_trained_distribution_by_each_backend(greedy, tmp_path, backend):
    """The checkpoint's own penalties and truncations, from its generation_config.json, are none of an evaluation's."""
    model = shutil.copytree(DEMO / "cfpo", tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 2.0, "top_k": 3}
    (model / "generation_config.json").write_text(json.dumps(config))
    summary = words(model, tmp_path / "out", "--backend", backend, "--vllm-python", str(VLLM))
    assert summary["tasks"][0]["score"] == greedy[0]["tasks"][0]["score"] > 0.97
    check_same_answers(tmp_path / "out", greedy[1])


def test_a_completion_that_the_context_ended_is_truncated(tmp_path):
    model = shutil.copytree(DEMO / "cfpo", tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    row = words(model, tmp_path / "out", "--limit", "50")["tasks"][0]
    assert row["tokens"] < 5
    assert row["truncated"] > 0.9


def test_answers_that_are_not_understood_are_left_out_and_counted(tmp_path):
    rows = [
        {"question": "abc>", "answer": answer} for answer in ("7", "2 hours 30 minutes", "2021-05-05", None, "x=5")
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(DEMO / "cfpo", tmp_path / "out", "--max-new-tokens", "4", task=str(tmp_path / "odd.jsonl"))
    assert "left out 3 questions whose answer is not surely understood: row 1: '2 hours 30 minutes' (" in result.stdout
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert (row["questions"], row["left_out"]) == (2, 3)
    (tmp_path / "odd.jsonl").write_text(json.dumps(rows[1]) + "\n")
    result = evaluate(DEMO / "cfpo", tmp_path / "out", task=str(tmp_path / "odd.jsonl"), check=False)
    assert "No question is left; the answer of none is surely understood" in result.stderr


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / folder / "data" / "test.jsonl" for folder in "abc"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    tasks = build_tasks([str(path) for path in paths], TaskOptions(), tmp_path / "linked")
    assert list(tasks.registered) == ["data_test", "data_test_2", "data_test_3"]


@pytest.mark.parametrize("question", ["", "0 1 2"])
def test_a_prompt_of_which_the_model_knows_nothing(question, tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question": question, "answer": "1"}) + "\n")
    result = evaluate(DEMO / "cfpo", tmp_path, task=str(tmp_path / "odd.jsonl"), check=False)
    assert result.returncode == 1
    assert f"row 0 asks {question!r}, of which the model knows no token" in result.stderr
    assert "Traceback" not in result.stderr


def test_line_ends_of_unicode_are_no_line_ends_of_the_results(tmp_path):
    row = {"question": "a\u2028b\u0085c", "scores": [1.0], "answers": ["1"], "gold": "1"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps({"tasks": [{"task": "t"}]}))
    assert compare.load(tmp_path) == {"t": [row]}


def test_make_passes_its_values_as_they_were_typed(tmp_path):
    prompt = """say "hi" $HOME `id` $(shell touch pwned) 'q' $$ # \\ x"""
    variables = {"MODEL": DEMO / "cfpo", "TASK": WORDS, "METRIC": "exact_match", "MAX_NEW_TOKENS": 6, "LIMIT": 2}
    variables |= {"OUT": tmp_path / "a folder", "SYSTEM_PROMPT": prompt}
    command = ["make", "evaluate", *(f"{name}={value}" for name, value in variables.items())]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "a folder" / "results.json").read_text())["options"]["system_prompt"] == prompt
    assert not (ROOT / "pwned").exists()


def test_a_server_that_runs_already(greedy, tmp_path):
    with serving(vllm_command(str(DEMO / "cfpo"), 1, "data", str(VLLM)), tmp_path / "log", 300.0) as url:
        words(DEMO / "cfpo", tmp_path / "server", "--backend", "server", "--server", url)
        assert health_problem(url) is None  # not ours to stop
    check_same_answers(tmp_path / "server", greedy[1])
    assert health_problem(url)


def test_two_processes_share_the_questions(greedy, tmp_path):
    words(DEMO / "cfpo", tmp_path, "--num-gpus", "2")  # the processes find no GPU and take the CPU
    check_same_answers(tmp_path, greedy[1])


def check_same_answers(folder: Path, reference: Path) -> None:
    ours, expected = (compare.load(path)["words_test"] for path in (folder, reference))
    assert len(expected) == 1000
    for one, other in zip(ours, expected, strict=True):
        for key in ("question", "completions", "scores", "tokens", "truncated"):
            assert one[key] == other[key]


def test_new_weights_under_the_same_path_are_read_and_nothing_is_written_there(tmp_path):
    model = shutil.copytree(DEMO / "start", tmp_path / "model")
    before = sorted(model.rglob("*"))
    scores = []
    for weights in ("start", "cfpo"):
        shutil.copy(DEMO / weights / "model.safetensors", model)
        summary = words(model, tmp_path / weights, "--samples", "4", "--temperature", "1.0", "--limit", "100")
        scores.append(summary["tasks"][0]["score"])
    assert scores[1] > scores[0] + 0.2
    assert sorted(model.rglob("*")) == before


def test_compare(sampled, greedy, capsys):
    compare.main([str(sampled["start"][1]), str(sampled["cfpo"][1])])
    printed = capsys.readouterr().out
    rows = [compare.load(sampled[name][1])["words_test"] for name in ("start", "cfpo")]
    row, differing = compare.compare("words_test", *rows)
    scores = [sampled[name][0]["tasks"][0]["score"] for name in ("start", "cfpo")]
    assert row["difference"] == pytest.approx(scores[1] - scores[0])
    assert 0.2 < row["low"] < row["difference"] < row["high"] < 0.6
    assert f"{len(differing)} questions differ:" in printed
    compare.main([str(greedy[1]), str(greedy[1])])
    assert "B − A +0.0000 [+0.0000, +0.0000]" in capsys.readouterr().out


def test_interval_of_the_difference_has_its_coverage():
    """The interval of ten thousand draws is that of the normal approximation, for a hundred differences."""
    differences = torch.linspace(-1, 1, 100).double().numpy() + 0.1
    low, high = compare.paired_interval(differences)
    error = differences.std(ddof=1) / 10
    assert low == pytest.approx(0.1 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.1 + 1.96 * error, abs=0.1 * error)


def test_compare_refuses_other_questions(sampled, greedy):
    with pytest.raises(EvaluationError, match="A answers 200 questions and B 1000"):
        compare.main([str(sampled["cfpo"][1]), str(greedy[1])])
    with pytest.raises(EvaluationError, match=r"has no results\.json"):
        compare.main([str(DEMO), str(DEMO)])


def test_adapter_is_merged(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "start")
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(prepare(str(tmp_path / "adapter"), tmp_path, READERS))
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=0, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(DEMO / "start")(ids).logits
    assert (merged(ids).logits - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("99.0.0", r"was saved by transformers 99\.0\.0, and the evaluator has 5\.23\.0"),
        ("5.20.0", r"was saved by transformers 5\.20\.0, and vLLM's environment has 5\.17\.0"),
    ],
)
def test_checkpoint_of_a_newer_transformers_is_refused(saved, message, tmp_path):
    model = shutil.copytree(DEMO / "start", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": saved}))
    options = parse(["--model", str(model), "--task", "t", "--backend", "vllm", "--vllm-python", str(VLLM)])
    with pytest.raises(CheckpointError, match=message):
        prepare(str(model), tmp_path, readers(options))


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("so 3 * 4 = 12\n#### 12", "The answer is 12.", 1),
        ("#### 12", "\\boxed{12}", 1),
        ("#### 1,200", "It costs $1200.", 1),
        ("#### 12", "ANSWER: 13", 0),
        ("#### 12", "I do not know.", 0),
        ("\\frac{1}{2}", "Therefore $\\boxed{0.5}$", 1),
        ("\\frac{1}{2}", "Therefore $\\boxed{\\frac{2}{4}}$", 1),
        ("\\frac{1}{2}", "Therefore $\\boxed{\\frac{1}{3}}$", 0),
        ("2x+3", "$\\boxed{3+2x}$", 1),
        ("\\sqrt{2}", "$\\boxed{\\sqrt{2}}$", 1),
        ("(1, 2)", "The point is $\\boxed{(1,2)}$.", 1),
        ("(1, 2)", "The point is $\\boxed{(2,1)}$.", 0),
        ("-3", "x = $\\boxed{-3}$", 1),
        ("-3", "x = $\\boxed{3}$", 0),
    ],
)
def test_scorer(gold, text, score, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"problem": "?", "solution": gold}) + "\n")
    tasks = build_tasks([str(tmp_path / "one.jsonl")], TaskOptions(samples=2), tmp_path / "data")
    config = tasks.module.TASKS_TABLE[0]
    doc: Doc = config.prompt_function({"problem": "?", "solution": gold, "__index": 0}, "task")
    response = ModelResponse(text=[text, "no idea"])
    assert config.metrics[0].sample_level_fn.compute(doc=doc, model_response=response) == score / 2
    assert doc.specific["scores"] == [score, 0.0]
    assert doc.specific["answers"][1] is None


@pytest.mark.parametrize(
    ("task", "row", "gold"),
    [
        ("amc23", {"question": "How many?", "answer": 27.0}, "$27.0$"),
        ("minerva_math", {"question": "How far?", "answer": "2x+3"}, "$2x+3$"),
        ("olympiadbench", {"question": "Which?", "final_answer": ["1", "2"]}, "$1, 2$"),
    ],
)
def test_tasks_of_a_hub_that_lighteval_lacks(task, row, gold, tmp_path):
    """By rows as their datasets have them; the hub itself is out of reach here."""
    module = build_tasks([task], TaskOptions(), tmp_path).module
    doc: Doc = module.TASKS_TABLE[0].prompt_function(row, task)
    assert doc.get_golds() == [gold]
    assert doc.query == row["question"] + "\nReason step by step, and put the final answer in \\boxed{}."


def test_the_group_is_known(tmp_path):
    assert len(build_tasks(["reasoning"], TaskOptions(), tmp_path).registered) == 8


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not at ../shared/data/gsm8k")
def test_gsm8k_by_path(tmp_path):
    evaluate(DEMO / "cfpo", tmp_path, "--limit", "8", "--max-new-tokens", "4", task=str(GSM8K))
    (row,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert (row["task"], row["questions"]) == ("gsm8k_test", 8)
    rows = compare.load(tmp_path)["gsm8k_test"]
    golds = [read_gold(json.loads(line)["answer"]) for line in GSM8K.read_text().splitlines()]
    assert {row["gold"] for row in rows} <= set(golds)
    assert row["no_answer"] == sum(row["answers"][0] is None for row in rows) / 8


def test_summary_by_hand():
    questions = [
        {"scores": [1.0, 0.0], "answers": ["1", None], "tokens": [2, 4], "truncated": [False, True]},
        {"scores": [1.0, 1.0], "answers": ["1", "1"], "tokens": [2, 2], "truncated": [False, False]},
    ]
    row = summarise("t", questions)
    assert (row["score"], row["n"], row["k"], row["questions"]) == (0.75, 2, 1, 2)
    assert row["standard_error"] == pytest.approx(0.25)  # deviation 0.3536 of 0.5 and 1, over √2
    assert (row["tokens"], row["truncated"], row["no_answer"]) == (2.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("no/where", str(WORDS), "MODEL='no/where' is no folder with a config.json"),
        (str(DEMO / "cfpo"), "gsm8", "TASK='gsm8' is no task of lighteval and no .jsonl file; near to it: gsm8k"),
        (str(DEMO / "cfpo"), "gone.jsonl", "TASK='gone.jsonl': there is no such file"),
        (str(DEMO / "cfpo"), "math_500", "A dataset of TASK='math_500' is not on this machine"),
        (str(DEMO / "cfpo"), "arc:easy", "does not extract an answer from a completion"),
    ],
)
def test_mistakes_stop_it_with_a_message(model, task, message, tmp_path):
    start = time.monotonic()
    result = evaluate(model, tmp_path, task=task, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 60


def test_unknown_columns(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "1", "solution": "1"}\n')
    with pytest.raises(TaskError, match="has the columns text, solution; it needs one of problem, question, prompt"):
        build_tasks([str(tmp_path / "odd.jsonl")], TaskOptions(), tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "4"], "SAMPLES=4 at TEMPERATURE=0 are all the same"),
        (["--backend", "server"], "SERVER=http://… and BACKEND=server go together"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--task", "t", *options])
    assert message in capsys.readouterr().err


def test_no_vllm():
    options = parse(["--model", "m", "--task", "t", "--backend", "vllm", "--vllm-python", "/no/python"])
    with pytest.raises(EvaluationError, match="BACKEND=vllm finds no vLLM"):
        readers(options)


def test_a_server_that_never_gets_healthy_is_stopped(tmp_path):
    pid = tmp_path / "pid"
    command = [
        sys.executable,
        "-c",
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(99)",
    ]
    with pytest.raises(ServerError, match="not healthy within 3 s"), serving(command, tmp_path / "log", 3.0):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_server_that_dies_at_the_start_shows_its_log(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(ServerError, match="no such model"), serving(command, tmp_path / "log", 60.0):
        pass
