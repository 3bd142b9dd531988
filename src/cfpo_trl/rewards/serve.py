"""Serves a reward model by HTTP: `{"prompts": [...], "completions": [...]}` in, `{"rewards": [...]}` out.

cfpo serve-reward runs/rlhf/reward_model --port 8100
"""

import argparse
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..mistakes import checking
from .model import RewardModel
from .scores import RewardError


def handler(model: RewardModel) -> type[BaseHTTPRequestHandler]:
    """The request handler for a model; one request is scored at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps the client's connection

        def do_GET(self) -> None:  # whether it is there
            self.answer(200, {"post": {"prompts": ["..."], "completions": ["..."]}, "answer": {"rewards": [0.0]}})

        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    self.answer(200, {"rewards": model.score(request["prompts"], request["completions"])})
            except (ValueError, TypeError, KeyError) as error:
                self.answer(400, {"error": f"bad request: {error!r}"})
            except RewardError as error:
                self.answer(422, {"error": str(error)})
            except Exception as error:  # out of memory, say: the trainer shall know why
                traceback.print_exc()
                self.answer(500, {"error": f"{type(error).__name__}: {error}"})

        def answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main(arguments: list[str]) -> None:
    """Serves until it is stopped. Raises a `Mistake` where the model cannot be loaded."""
    parser = argparse.ArgumentParser(prog="cfpo serve-reward", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="folder or hub name of a sequence classifier with one output")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--batch-size", type=int, default=16, help="completions in a forward pass")
    parser.add_argument("--max-length", type=int, help="longest sequence in tokens; default: the model's")
    parser.add_argument("--normalize", action="store_true", help="by the mean and std in the model's config")
    options = parser.parse_args(arguments)
    with checking():
        model = RewardModel(options.model, options.batch_size, None, options.max_length, options.normalize)
    server = ThreadingHTTPServer((options.host, options.port), handler(model))
    print(f"Serving {options.model} at http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()
