"""The recipes that come with the package, by name, such as `demo/config_cfpo`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..mistakes import Mistake
from ..suggestions import nearest

FOLDER = Path(__file__).parent.parent / "recipes"
ENGINES = FOLDER / "accelerate_configs"


def recipes() -> Iterator[tuple[str, str]]:
    """Name and first comment of each recipe."""
    for path in sorted(FOLDER.glob("*/**/config*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield str(path.relative_to(FOLDER).with_suffix("")), first.lstrip("# ")


def find(name: str) -> Path | None:
    """The file of the recipe of that name, with or without its ending; None where there is none."""
    path = FOLDER / name
    return next((file for file in (path, path.with_name(f"{path.name}.yaml")) if file.is_file()), None)


def engine(name: str) -> Path:
    """Accelerate's configuration of that name. Raises a `Mistake` that names those there are."""
    path = ENGINES / f"{name}.yaml"
    if not path.is_file():
        names = [str(file.relative_to(ENGINES).with_suffix("")) for file in sorted(ENGINES.rglob("*.yaml"))]
        raise Mistake(f"--engine {name}: there is none{nearest(name, names)}; use one of {', '.join(names)}.")
    return path


def copy(name: str, target: Path) -> Path:
    """A copy of the recipe to change. Raises a `Mistake` where there is no such recipe, or a file in its place."""
    source = find(name)
    if source is None:
        names = [known for known, _ in recipes()]
        raise Mistake(f"{name!r} is no recipe{nearest(name, names)}; `cfpo recipes` lists them.")
    target = target / f"{name.replace('/', '-').removesuffix('.yaml')}.yaml" if target.is_dir() else target
    if target.exists():
        raise Mistake(f"{target} is there already.")
    shutil.copyfile(source, target)
    return target


def main(arguments: list[str]) -> None:
    """`cfpo recipes` lists them, `cfpo recipes NAME [FILE]` copies one, by default into the working directory."""
    if not arguments:
        listed = list(recipes())
        width = max(len(name) for name, _ in listed)
        print("\n".join(f"{name:<{width}}  {about}" for name, about in listed))
        print("\nTrain one with `cfpo train --config NAME`, copy one to change it with `cfpo recipes NAME FILE`.")
    elif len(arguments) <= 2:
        print(copy(arguments[0], Path(arguments[1] if len(arguments) == 2 else ".")))
    else:
        raise Mistake("usage: cfpo recipes [NAME [FILE]]")
