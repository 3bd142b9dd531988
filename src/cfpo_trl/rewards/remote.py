"""Rewards from a server: completions go out by HTTP in batches, and a number for each comes back."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from .scores import RewardError, checked, scored_together

BUSY = (429, 500, 502, 503, 504)  # statuses that may pass
START = "start it (`cfpo serve-reward <model>` serves a local one), or correct reward_funcs"


class RewardServer:
    """Posts `{"prompts": [...], "completions": [...]}` to a URL, which answers `{"rewards": [...]}`.

    Prompts and completions are texts, or conversations as lists of messages; a reward is a number, or null where none
    applies. `cfpo serve-reward` starts such a server.

    Args:
        url: Where to post.
        batch_size: Completions in a request; default 64.
        timeout: Seconds to wait for an answer; default 60.
        retries: How often a request is sent again after no answer or a busy status (429, 5xx): at once, then after
            2, 4, … seconds; default 3.

    Raises:
        ValueError: nothing listens there.
    """

    def __init__(self, url: str, batch_size: int = 64, timeout: float = 60.0, retries: int = 3):
        self.url, self.batch_size, self.timeout, self.retries = url, batch_size, timeout, retries
        parts = urlsplit(url)
        self.session = requests.Session()
        policy = Retry(
            retries,
            backoff_factor=1.0,
            status_forcelist=BUSY,
            allowed_methods=None,  # POST, too
            raise_on_status=False,  # what a failed server says is shown
            respect_retry_after_header=False,  # it may ask for hours
        )
        self.session.mount(f"{parts.scheme}://", HTTPAdapter(max_retries=policy))
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            self.__name__ = f"{parts.hostname}:{port}{parts.path.rstrip('/')}"  # TRL's name for it in the log
            requests.get(url, timeout=timeout)  # whatever it answers; by the proxies that the session takes, too
        except (requests.RequestException, KeyError) as error:
            raise ValueError(f"reward_funcs has {url!r}, where no server listens: {error!r}; {START}.") from error

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """A reward per completion. Raises a `RewardError`, on every process, where the server does not give it."""
        return scored_together(lambda: self.score(prompts, completions))

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """As a call, for this process alone."""
        scores: list[float | None] = []
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self.ask(list(prompts[part]), list(completions[part]))
        return scores

    def ask(self, prompts: list[Any], completions: list[Any]) -> list[float | None]:
        """The rewards of one request."""
        source = f"Reward server {self.url}"
        try:
            request = {"prompts": prompts, "completions": completions}
            response = self.session.post(self.url, json=request, timeout=self.timeout)
            answer = response.json()
        except requests.JSONDecodeError as error:
            raise RewardError(
                f"{source} gave no JSON but, with status {response.status_code}, {error.doc[:200]!r}"
            ) from error
        except requests.RequestException as error:
            raise RewardError(
                f"{source} gave no rewards within timeout={self.timeout:g} s, {self.retries} retries: {error}"
            ) from error
        if response.status_code != 200 or not isinstance(answer, dict) or "rewards" not in answer:
            raise RewardError(
                f'{source} gave, with status {response.status_code}, no {{"rewards": [...]}} but {str(answer)[:200]}'
            )
        return checked(answer["rewards"], len(completions), source)
