"""What the processes of a run decide together."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def decided_by_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on all of them; if it raises there, all raise the same exception.

    Without that, the others would wait for the main one until their collective's time-out.
    """
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    decision: list = [None, None]
    if state.is_main_process:
        try:
            decision[0] = decide()
        except Exception as error:
            decision[1] = error
    broadcast_object_list(decision)
    if decision[1] is not None:
        raise decision[1]
    return decision[0]


def leave_together() -> None:
    """Waits for all processes and closes their group: one that ends while another still talks to it may abort."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
