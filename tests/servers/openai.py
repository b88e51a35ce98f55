"""A web server that answers as OpenAI's chat completions do, and misbehaves where it is told to."""
import json
import threading
import time
from collections.abc import Callable

from servers import web

KEY = "sk-made-up/0123456789"


class OpenAI(web.Server):
    """`reply` makes the text of a reply from the last message. `faults` are done instead, one a request, in their order: a status
    with headers and a body, bytes to send as the body of a 200, a number of seconds to sleep first, or "drop", "drip",
    "endless". `log` holds (time, path, key, body). Other keys than `key` are refused."""
    def __init__(self, reply: Callable[[str], str | None], key: str = KEY):
        super().__init__(Handler)
        self.reply, self.key, self.faults, self.log, self.turn = reply, key, [], [], threading.Lock()
        self.url = f"{self.address}/v1"

    def prompts(self) -> list[str]:
        "The last message of each request."
        return [body["messages"][-1]["content"] for _, _, _, body in self.log]

    def handle_error(self, *_): pass


class Handler(web.Handler):
    def do_GET(self):
        self.server.log.append((time.monotonic(), self.path, "", {}))
        self.answer(200, b"somewhere else")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.server.turn:
            self.server.log.append((time.monotonic(), self.path, key, body))
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, tuple): return self.answer(*fault)
        if isinstance(fault, bytes): return self.answer(200, fault)
        if fault == "drop": self.close_connection = True; return
        if fault == "drip": return self.stream(b" ", 0.02)
        if fault == "endless": return self.stream(b" " * (1 << 20), 0)
        if isinstance(fault, (int, float)): time.sleep(fault)
        if key != self.server.key: return self.answer(401, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode())
        if self.path != "/v1/chat/completions": return self.answer(404, b'{"detail":"Not Found"}')
        message = {"role": "assistant", "content": self.server.reply(body["messages"][-1]["content"])}
        self.answer(200, json.dumps({"object": "chat.completion", "model": body["model"],
                                     "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode())

    def stream(self, part: bytes, pause: float) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(400): self.wfile.write(part); self.wfile.flush(); time.sleep(pause)
        self.close_connection = True
