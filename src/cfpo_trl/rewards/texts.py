"""What every reward reads: the text of a completion, in either of TRL's two forms."""

from typing import Any


def text_of(completion: Any) -> str:
    """The completion's text: itself, or the content of a conversation's last message; empty where there is none."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # a message in parts: the text ones
        content = "".join(part.get("text") or "" for part in content)
    return content or ""
