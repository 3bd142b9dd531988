"""The environment of `make demo-agent`: four boxes, in each a letter that only a look shows."""

from typing import Any

BOXES = "abcd"


class Rooms:
    """A room for each completion; its letters come from the row's column `boxes`, such as `qxze`."""

    def reset(self, boxes: str, **row: Any) -> None:
        self.letters = dict(zip(BOXES, boxes, strict=True))

    def look(self, box: str) -> str:
        """Looks into a box.

        Args:
            box: Name of the box.

        Returns:
            The letter in it.
        """
        if box not in self.letters:
            raise ValueError("none")
        return self.letters[box]
