"""Images in a dataset: found, of the kind that TRL reads, and for a model that takes them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("image", "images")  # TRL's names


def image_column(dataset: "Dataset") -> str | None:
    """The column of images, if there is one. Raises a `ValueError` where there are both of TRL's."""
    found = [name for name in COLUMNS if name in dataset.column_names]
    if len(found) > 1:
        raise ValueError("The dataset has the columns image and images; keep one of them.")
    return found[0] if found else None


def with_images(dataset: "Dataset", dataset_name: str | None) -> "Dataset":
    """The dataset, in whose column `image` or `images` paths, or bytes, have become images, read where they are used.

    Raises:
        ValueError: a path leads nowhere; paths are looked up here, and beside the dataset's file.
    """
    from datasets import Image, List

    column = image_column(dataset)
    if column is None:
        return dataset
    kind = dataset.features[column]
    one = kind.feature if isinstance(kind, List) else kind
    if isinstance(one, Image):
        return dataset
    if getattr(one, "dtype", None) == "string":
        beside = Path(dataset_name or ".")
        beside = beside if beside.is_dir() else beside.parent
        found = [found_paths(cell, beside, row, column) for row, cell in enumerate(dataset[column])]
        # Added first: without a column it would have no rows.
        dataset = dataset.add_column("found", found).remove_columns(column).rename_column("found", column)
    return dataset.cast_column(column, List(Image()) if isinstance(kind, List) else Image())


def found_paths(cell: Any, beside: Path, row: int, column: str) -> Any:
    """The path or paths of a row, as they are found."""
    if isinstance(cell, list):
        return [found_paths(path, beside, row, column) for path in cell]
    if cell is None:
        return None
    for path in (Path(cell), beside / cell):
        if path.is_file():
            return str(path)
    raise ValueError(f"Row {row} has {column}={cell!r}, which is no file here or in {str(beside)!r}.")


def check_images(dataset: "Dataset", processor: Any, asynchronous: bool) -> None:
    """Raises a `ValueError` where the dataset has images, and the model or the trainer takes none."""
    column = image_column(dataset)
    if column is None:
        return
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"The dataset has a column {column!r}, and the model has no processor of images; remove it.")
    if asynchronous:
        raise ValueError(f"The dataset has a column {column!r}: TRL's asynchronous trainer takes text alone.")


def placeholders_of(dataset: "Dataset") -> list[list[Any]]:
    """As many objects as each row has images, without reading them."""
    from datasets import Image, List

    column = image_column(dataset)
    if column is None:
        return [[]] * len(dataset)
    kind = Image(decode=False)
    several = isinstance(dataset.features[column], List)
    cells = dataset.select_columns(column).cast_column(column, List(kind) if several else kind)[column]
    return [list(cell or []) if several else [cell] if cell is not None else [] for cell in cells]
