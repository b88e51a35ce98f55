"""A web server that answers as the model hub does where a dataset is streamed: its files, their list, parts of them."""
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from servers import web

COMMIT = "c" * 40


class Hub(web.Server):
    "`repositories` is {OWNER/NAME: {path: bytes}}. `log` holds (method, path, range)."

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(Handler)
        self.repositories, self.log = repositories, []
        self.endpoint = self.address


class Handler(web.Handler):
    def do_GET(self):
        url = urlsplit(self.path)
        path, asked = unquote(url.path), parse_qs(url.query)
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        found = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|revision|tree)/[^/]+(?:/(.*))?)?", path)
        if not found: return self.answer(404, b"")
        name, verb, inside = found.groups()
        files = self.server.repositories.get(name)
        if files is None: self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif verb == "resolve": self.file(files.get(inside))
        elif verb == "tree": self.json(self.tree(files, inside or "", asked.get("recursive", [""])[0].lower() == "true"))
        else: self.json(dict(id=name, sha=COMMIT, private=False, tags=[], siblings=[dict(rfilename=f) for f in files]))

    do_HEAD = do_GET

    @staticmethod
    def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        below = [f for f in files if f.startswith(prefix)]
        folders = {prefix + "/".join(rest[:n]) for f in below for rest in [f.removeprefix(prefix).split("/")] for n in range(1, len(rest))}
        found = [dict(type="file", path=f, size=len(files[f]), oid=hashlib.sha1(files[f]).hexdigest()) for f in below]
        found += [dict(type="directory", path=f, size=0, oid=hashlib.sha1(f.encode()).hexdigest()) for f in sorted(folders)]
        return [x for x in found if recursive or "/" not in x["path"].removeprefix(prefix)]

    def file(self, data: bytes | None) -> None:
        if data is None: return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part: return self.answer(200, data, headers)
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        if first > last: return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[first:last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def json(self, data) -> None: self.answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})
