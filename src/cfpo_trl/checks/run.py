"""`cfpo check`: runs what can run on this machine, and ends with a table and a file to attach to an issue."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..mistakes import Mistake
from .machine import facts
from .parts import PARTS, Part

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_part(name: str, part: Part, out: Path) -> dict[str, Any]:
    """Runs it in a session of its own, which is killed as a whole when it ends or its time is over."""
    slug = name.replace(", ", "-").replace(" ", "-")
    log, result = out / f"{slug}.log", out / f"{slug}.json"
    result.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, "-m", "cfpo_trl.checks.part", name, str(out), str(result)]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | OFFLINE, start_new_session=True
        )
        try:
            process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status, detail = "failed", f"stopped after {part.seconds} s; its log is {log}"
        else:
            status, detail = "failed", f"ended with status {process.returncode}; its log is {log}"
        finally:
            process.kill()
            kill_session(process.pid)
            process.wait()
    if result.exists():
        status, detail = json.loads(result.read_text())
    return {"part": name, "status": status, "seconds": round(time.monotonic() - start, 1), "detail": detail}


def kill_session(leader: int) -> None:
    """All that the part started: its launchers make process groups of their own within its session."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown."""
    rows = [f"| {r['part']} | {r['status']} | {r['seconds']:.0f} | {r['detail']} |" for r in results]
    return "\n".join(["| part | result | seconds | measured, or why not |", "|---|---|---|---|", *rows])


def report(machine: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The file for an issue: the table, and what the machine has."""
    gpus = ", ".join(f"{gpu['name']} ({gpu['GiB']} GiB)" for gpu in machine["gpus"]) or "no GPU"
    return f"# cfpo check: {gpus}\n\n{table(results)}\n\n```json\n{json.dumps(machine, indent=1)}\n```\n"


def main(arguments: list[str]) -> None:
    """Checks. Raises a `SystemExit` with status 1 where a part failed, and a `Mistake` where there is no such part."""
    parser = argparse.ArgumentParser(prog="cfpo check", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these alone; default: all that can run here")
    parser.add_argument("--out", type=Path, default=Path("runs/check"), help="folder of its files")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no part after this time")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts or []) - PARTS.keys():
        raise Mistake(f"no part {', '.join(sorted(unknown))}; use of: {', '.join(PARTS)}.")
    options.out.mkdir(parents=True, exist_ok=True)
    machine, results, start = facts(), [], time.monotonic()
    for name in options.parts or PARTS:
        part = PARTS[name]
        late = time.monotonic() - start > 60 * options.minutes
        if reason := "no time was left" if late else part.missing(machine):
            results.append({"part": name, "status": "skipped", "seconds": 0.0, "detail": reason})
        else:
            print(f"{name}: {part.about} …", flush=True)
            results.append(run_part(name, part, options.out.resolve()))
    path = options.out / "check.md"
    path.write_text(report(machine, results), encoding="utf-8")
    (options.out / "check.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    print(f"\n{table(results)}\n\nFor an issue: {path}")
    if any(result["status"] == "failed" for result in results):
        sys.exit(1)
