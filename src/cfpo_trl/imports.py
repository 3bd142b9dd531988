"""Objects by their dotted paths, from the package, the environment or a module beside the recipe."""

import importlib
import os
import sys
from typing import Any

from .suggestions import nearest


def imported(option: str, path: str, shown: str | None = None) -> Any:
    """The attribute that a dotted path names.

    Args:
        option: Where the path was given, for the message.
        path: Such as `my_package.my_module.my_function`.
        shown: What the user wrote, where that is not the path.

    Raises:
        ValueError: the module or the attribute does not exist.
    """
    shown = path if shown is None else shown
    if not isinstance(path, str):  # of a mapping in a recipe
        raise ValueError(f"{option} has {shown!r}, which is no dotted path such as my_package.my_module.my_function.")
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{option} has {shown!r}, which is no dotted path such as my_package.my_module.{path}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module beside the recipe
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{option} has {shown!r}, which cannot be imported: {error}.") from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"{option} has {shown!r}, and {module_name} has no {attribute!r}{nearest(attribute, vars(module))}."
        )
    return getattr(module, attribute)
