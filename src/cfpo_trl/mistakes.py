"""What a user can correct, said in one line."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent)


class Mistake(ValueError):
    """Something that the user can correct; the message names the value, the rule and the fix."""


@contextmanager
def checking() -> Iterator[None]:
    """What goes wrong in this block, before anything is trained, is the user's to correct: it becomes a `Mistake`."""
    try:
        yield
    except Mistake:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Mistake(str(error)) from error


def say_mistakes(main: Callable[[], None]) -> None:
    """Runs `main`; of a `Mistake` the last thing said is a line `error: …`, and the process exits with status 1.

    A traceback stands before it only where the error comes from another package, whose message may not say enough.
    """
    try:
        main()
    except Mistake as mistake:
        cause = mistake.__cause__ or mistake
        raised_in = traceback.extract_tb(cause.__traceback__)[-1].filename
        from accelerate import PartialState  # seconds, which `cfpo --help` does not wait for

        if PartialState().is_local_main_process:
            if not raised_in.startswith(PACKAGE):
                traceback.print_exception(cause)
            print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr, flush=True)
        sys.exit(1)
