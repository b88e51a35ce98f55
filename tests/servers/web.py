"""What the made-up web servers share: they serve while a `with` lasts, each request in a thread, and say nothing."""
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_): self.shutdown(); self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def head(self, status: int, size: int, headers: dict | None = None) -> None:
        "Send all but the body."
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **(headers or {})}.items(): self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.head(status, len(data), headers)
        if self.command != "HEAD": self.wfile.write(data)
