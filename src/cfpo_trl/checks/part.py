"""One part of the check, in this process: `python -m cfpo_trl.checks.part NAME FOLDER RESULT`."""

import json
import sys
from pathlib import Path

from .parts import PARTS


def main(name: str, folder: str, result: str) -> None:
    """Leaves in the file `result` whether the part passed, and what it measured."""
    try:
        found = ["passed", PARTS[name].load()(Path(folder))]
    except AssertionError as error:
        found = ["failed", str(error)]
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
