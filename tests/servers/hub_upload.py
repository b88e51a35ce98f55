"""A web server that answers as the model hub does where a model is published: who one is, repositories, large files, commits."""
import base64
import hashlib
import json
import re
from urllib.parse import unquote, urlsplit

from servers import web

COMMIT = "d" * 40


class Upload(web.Server):
    "Tokens other than `token` are refused. `repositories` is {OWNER/NAME: {path: bytes}}, `private` those made so; `log` holds (method, path)."

    def __init__(self, token: str = "hf_right"):
        super().__init__(Handler)
        self.token, self.repositories, self.private, self.stored, self.log, self.fail = token, {}, set(), {}, [], {}
        self.endpoint = self.address

    def written(self) -> list[tuple[str, str]]: return [x for x in self.log if x[0] in ("POST", "PUT", "DELETE")]


class Handler(web.Handler):
    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""): return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16): found += self.rfile.read(size); self.rfile.readline()
        self.rfile.readline()
        return found

    def json(self, data, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})

    def asked(self) -> tuple[str, bytes] | None:
        "Path and body of a request that may be answered."
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.server.log.append((self.command, path))
        for part, status in self.server.fail.items():
            if part in path: return self.json({"error": "as told"}, status)
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.json({"error": "Invalid credentials"}, 401)
        return path, data

    def do_GET(self):
        if not (asked := self.asked()): return
        path, name = asked[0], None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/.*)?", path): name = found[1]
        if path == "/api/whoami-v2": self.json({"type": "user", "name": "jo", "auth": {"type": "access_token"}})
        elif name in self.server.repositories: self.json(dict(id=name, sha=COMMIT, private=name in self.server.private, tags=[], siblings=[]))
        else: self.json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        if not (asked := self.asked()): return
        path, data = asked
        if path == "/api/repos/create": return self.create(json.loads(data))
        if path == "/api/validate-yaml": return self.json({"errors": [], "warnings": []})
        name, verb = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|info)/.*", path).groups()
        if verb == "preupload":
            return self.json({"files": [dict(path=f["path"], uploadMode="lfs" if f["path"].endswith((".safetensors", ".png")) else "regular",
                                             shouldIgnore=False, oid=None) for f in json.loads(data)["files"]]})
        if verb == "info": return self.batch(json.loads(data))
        self.commit(name, [json.loads(line) for line in data.splitlines() if line.strip()])

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'jo'}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repositories: return self.json(url | {"error": "You already created this model repo"}, 409)
        self.server.repositories[name] = {}
        if asked.get("private") or asked.get("visibility") == "private": self.server.private.add(name)
        self.json(url)

    def batch(self, asked: dict) -> None:
        at = lambda o: {"upload": {"href": f"{self.server.endpoint}/store/{o['oid']}", "header": {}}}
        self.json({"transfer": "basic", "objects": [o | {"actions": at(o)} for o in asked["objects"]]})

    def do_PUT(self):
        if not (asked := self.asked()): return
        path, data = asked
        oid = path.removeprefix("/store/")
        if hashlib.sha256(data).hexdigest() != oid: return self.json({"error": "other bytes"}, 400)
        self.server.stored[oid] = data
        self.json({})

    def commit(self, name: str, lines: list[dict]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            v = line["value"]
            if line["key"] == "file": files[v["path"]] = base64.b64decode(v["content"])
            if line["key"] == "lfsFile": files[v["path"]] = self.server.stored[v["oid"]]
        self.json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.endpoint}/{name}/commit/{COMMIT}"})
