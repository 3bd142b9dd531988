"""What every reward reads: the text of a completion, in either of TRL's two forms."""

from typing import Any


def text_of(completion: Any) -> str:
    """The completion's text: itself, or the content of a conversation's last message.

    Empty where there is none, or where that is not the policy's: what a tool wrote earns nothing.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    content = last.get("content") if last.get("role", "assistant") == "assistant" else None
    if isinstance(content, list):  # a message in parts: the text ones
        content = "".join(part.get("text") or "" for part in content)
    return content or ""
