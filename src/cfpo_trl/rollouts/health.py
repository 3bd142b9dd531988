"""Whether an inference server is well."""

import requests

SECONDS_TO_ANSWER = 5.0  # for a request that needs no computation


def health_problem(url: str) -> str | None:
    """None where the server and its engine are well, else what is wrong."""
    try:
        status = requests.get(f"{url}/health", timeout=SECONDS_TO_ANSWER).status_code
    except requests.RequestException as error:
        return f"{type(error).__name__}, it does not answer"
    return None if status == 200 else f"/health answers with status {status}"
