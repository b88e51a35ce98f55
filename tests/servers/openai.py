"""A web server that answers as OpenAI's chat completions do, and misbehaves where it is told to."""
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-made-up/0123456789"


class OpenAI(ThreadingHTTPServer):
    """`reply` makes the text of a reply from the last message. `faults` are done instead, one a request, in their order: a status
    with headers and a body, bytes to send as the body of a 200, a number of seconds to sleep first, or "drop", "drip",
    "endless". `log` holds (time, path, key, body). Other keys than `key` are refused."""
    daemon_threads = True

    def __init__(self, reply: Callable[[str], str | None], key: str = KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.key, self.faults, self.log, self.turn = reply, key, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        "The last message of each request."
        return [body["messages"][-1]["content"] for _, _, _, body in self.log]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_): self.shutdown(); self.server_close()
    def handle_error(self, *_): pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

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

    def answer(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
