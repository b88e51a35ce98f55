"""Fetching: over a real pip from an index of our own, from the cache, from S3, and everything that can be wrong."""
import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from domain_adapt import assets, s3
from domain_adapt.assets import ASSETS, Asset, cache_folder, cached, fetch, package_file, resolve, unpack
from domain_adapt.params import UserError
from domain_adapt.runs import ROOT

REAL_CACHE = cache_folder()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DOMAIN_ADAPT_OFFLINE", raising=False)
    return tmp_path / "cache"


def wheel(members: dict[str, str]) -> bytes:
    info = "demo_assets-1.0.dist-info"
    about = {f"{info}/METADATA": "Metadata-Version: 2.1\nName: demo-assets\nVersion: 1.0\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{info}/RECORD": ""}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        for name, text in {**members, **about}.items(): z.writestr(name, text)
    return data.getvalue()


def asset(data: bytes, **changes) -> Asset:
    made = Asset("demo-assets", "1.0", "demo_assets-1.0-py3-none-any.whl", len(data), hashlib.sha256(data).hexdigest(),
                 "demo_assets", "*.txt", "none")
    return replace(made, **changes)


def put(cache: Path, made: Asset, data: bytes) -> Path:
    path = cache / "downloads" / made.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def left_over(cache: Path) -> list[Path]:
    "Everything in the cache but its locks."
    return [p for p in cache.rglob("*") if p.is_file() and ".locks" not in p.parts]


@pytest.fixture
def index(monkeypatch):
    "A package index on loopback, the only one pip knows: index(data) serves the demo wheel; .hits counts its downloads."
    servers = []

    def serve(data: bytes, stall: bool = False):
        hits = Counter()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hits[self.path] += 1
                file = "demo_assets-1.0-py3-none-any.whl"
                body = data if self.path.endswith(".whl") else f'<a href="/{file}">{file}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if body is data else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if stall and body is data: self.wfile.write(body[:10]); self.wfile.flush(); time.sleep(60)
                else: self.wfile.write(body)

            def log_message(self, *_): pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        only_index(monkeypatch, server.server_port)
        return hits

    yield serve
    for s in servers: s.shutdown(); s.server_close()


def only_index(monkeypatch, port: int) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_downloads_once_and_unpacks_only_what_is_wanted(cache, index):
    data = wheel({"demo_assets/a.txt": "wanted", "demo_assets/b.py": "raise SystemExit", "other/c.txt": "no"})
    hits = index(data)
    folder = fetch("demo", asset(data))
    assert {p.name: p.read_text() for p in folder.rglob("*")} == {"a.txt": "wanted"}
    asked = hits.total()
    assert fetch("demo", asset(data)) == folder and hits.total() == asked
    assert hits["/demo_assets-1.0-py3-none-any.whl"] == 1
    assert sorted(p.name for p in left_over(cache)) == ["a.txt", "demo_assets-1.0-py3-none-any.whl"]


def test_nothing_is_installed(cache, index):
    data = wheel({"demo_assets/a.txt": "x"})
    index(data)
    fetch("demo", asset(data))
    found = subprocess.run([sys.executable, "-c", "import demo_assets"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr


def test_callers_at_once_share_one_download(cache, index):
    data = wheel({"demo_assets/a.txt": "x"})
    hits = index(data)
    with ThreadPoolExecutor(4) as pool: folders = set(pool.map(lambda _: fetch("demo", asset(data)), range(4)))
    assert len(folders) == 1 and hits["/demo_assets-1.0-py3-none-any.whl"] == 1


@pytest.mark.fault
def test_another_file_on_the_index_is_refused(cache, index):
    data = wheel({"demo_assets/a.txt": "x"})
    index(wheel({"demo_assets/a.txt": "changed by somebody"}))
    with pytest.raises(UserError, match="HASHES.*pip download .*demo-assets==1.0") as e: fetch("demo", asset(data))
    assert asset(data).sha256 in str(e.value) and not left_over(cache)


@pytest.mark.fault
def test_no_network_and_no_cache(cache, monkeypatch):
    only_index(monkeypatch, 9)
    with pytest.raises(UserError) as e: resolve("package:news")
    for part in ("gensim==4.4.0", str(cache / "downloads"), "pip download --no-deps", ASSETS["news"].file): assert part in str(e.value)
    assert not left_over(cache)


@pytest.mark.fault
def test_offline_setting_tries_nothing(cache, index, monkeypatch):
    data = wheel({"demo_assets/a.txt": "x"})
    hits = index(data)
    monkeypatch.setenv("DOMAIN_ADAPT_OFFLINE", "1")
    with pytest.raises(UserError, match="DOMAIN_ADAPT_OFFLINE"): fetch("demo", asset(data))
    assert not hits
    put(cache, asset(data), data)
    assert (fetch("demo", asset(data)) / "a.txt").read_text() == "x"


@pytest.mark.fault
def test_wrong_checksum_names_the_file_and_removes_it(cache):
    data = wheel({"demo_assets/a.txt": "x"})
    path = put(cache, asset(data), data[:-1])
    with pytest.raises(UserError) as e: package_file(asset(data))
    for part in (str(path), asset(data).sha256, hashlib.sha256(data[:-1]).hexdigest()): assert part in str(e.value)
    assert not left_over(cache)


@pytest.mark.fault
def test_interrupted_download_leaves_nothing(cache, index):
    data = wheel({"demo_assets/a.txt": "x" * 10000})
    hits = index(data, stall=True)
    code = f"from domain_adapt.assets import *; fetch('demo', {asset(data)!r})"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.time() + 30
    while not any(k.endswith(".whl") for k in hits) and time.time() < deadline: time.sleep(0.05)
    time.sleep(0.3)
    children = Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
    p.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in p.communicate(timeout=20)[1]
    assert children and not any(Path(f"/proc/{c}").exists() for c in children)
    assert not left_over(cache) and not list(cache.rglob("*.part"))


@pytest.mark.fault
def test_what_a_killed_maker_left_is_cleared(cache):
    killed = cache / "models" / ".m.1234.part"
    killed.mkdir(parents=True)
    (killed / "half").write_text("ha")
    assert (cached("models/m", lambda f: (f / "whole").write_text("whole")) / "whole").is_file()
    assert not killed.exists()


@pytest.mark.fault
def test_failed_maker_leaves_nothing(cache):
    def fail(folder): (folder / "half").write_text("ha"); raise RuntimeError("stop")
    with pytest.raises(RuntimeError): cached("models/m", fail)
    assert not left_over(cache)


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DOMAIN_ADAPT_CACHE"): cached("a/b", lambda f: None)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["demo_assets/../../evil.txt", "demo_assets//evil.txt"])
def test_wheel_members_cannot_leave(tmp_path, name):
    archive = tmp_path / "in" / "d.whl"
    archive.parent.mkdir()
    archive.write_bytes(wheel({name: "evil"}))
    with pytest.raises(UserError, match="leads out"): unpack(asset(b""), archive, tmp_path / "out")
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.fault
def test_sdist_members_cannot_leave_and_links_are_not_followed(tmp_path):
    archive = tmp_path / "d.tar.gz"
    with tarfile.open(archive, "w:gz") as t:
        for name, text in {"demo_assets/a.txt": b"fine"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            t.addfile(member, io.BytesIO(text))
        link = tarfile.TarInfo("demo_assets/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
    (tmp_path / "out").mkdir()
    unpack(asset(b""), archive, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]
    with tarfile.open(archive, "w:gz") as t: t.addfile(tarfile.TarInfo("demo_assets/../evil.txt"))
    with pytest.raises(UserError, match="leads out"): unpack(asset(b""), archive, tmp_path / "out")


def test_unknown_names_and_missing_paths(cache):
    with pytest.raises(UserError, match="filings-10k, wikipedia, news, benchmarks"): resolve("package:filings")
    with pytest.raises(UserError, match="no such file"): resolve("no/such/place")
    with pytest.raises(UserError, match="no such file"): resolve(" ")


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve("here") == tmp_path / "here" == resolve(str(tmp_path / "here"))
    assert resolve("tests/test_assets.py") == ROOT / "tests" / "test_assets.py"


@pytest.mark.oracle
@pytest.mark.parametrize("name", ASSETS)
def test_real_assets(name, monkeypatch):
    made = ASSETS[name]
    if not (REAL_CACHE / "downloads" / made.file).is_file(): pytest.skip(f"{made.file} is not in {REAL_CACHE}")
    monkeypatch.setenv("DOMAIN_ADAPT_OFFLINE", "1")
    assert package_file(made).stat().st_size == made.size
    files = {"smollm2-135m-instruct": 1, "filings-10k": 3, "wikipedia": 1, "news": 1}
    folders = {"benchmarks": "hf_datasets/hellaswag", "medical-questions": "oe_eval_tasks"}
    at = resolve(f"package:{name}")
    if name in files: assert (1 if at.is_file() else len(list(at.iterdir()))) == files[name]
    else: assert (at / folders[name]).is_dir()
    if name == "filings-10k":
        assert b"<ix:" in resolve("package:filings-10k/tgt_2026_10k.html").read_bytes()
        with pytest.raises(UserError, match="aapl_2025_10k.html"): resolve("package:filings-10k/msft.html")
        with pytest.raises(UserError, match="leads out"): resolve("package:filings-10k/../news")


@pytest.fixture
def bucket(monkeypatch):
    "A bucket `data` on a moto server (any credentials do), as a boto3 client."
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(port=0, verbose=False)
    import boto3
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server._server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3._client.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    s3._client.cache_clear()
    server.stop()


def test_s3(cache, bucket, monkeypatch):
    for key, body in {"filings/a.html": b"A", "filings/deep/b.html": b"BB", "filings2/c.html": b"C"}.items():
        bucket.put_object(Bucket="data", Key=key, Body=body)
    one = resolve("s3://data/filings/a.html")
    assert one.name == "a.html" and one.read_bytes() == b"A"
    folder = resolve("s3://data/filings/")
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.html")} == {"a.html": b"A", "deep/b.html": b"BB"}
    before = folder.stat().st_mtime_ns
    assert resolve("s3://data/filings") != resolve("s3://data/filings2") and resolve("s3://data/filings/").stat().st_mtime_ns == before
    bucket.put_object(Bucket="data", Key="filings/a.html", Body=b"Z")
    assert resolve("s3://data/filings/a.html").read_bytes() == b"Z"
    for missing in ("s3://data/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(UserError, match=missing): resolve(missing)
    monkeypatch.setenv("DOMAIN_ADAPT_OFFLINE", "1")
    with pytest.raises(UserError, match="OFFLINE"): resolve("s3://data/filings")
    assert not list(cache.rglob("*.part"))


@pytest.mark.fault
def test_s3_without_a_server(cache, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3._client.cache_clear()
    start = time.time()
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"): resolve("s3://data/filings")
    assert time.time() - start < 10, "six attempts wait for longer"


def test_importing_is_light():
    code = "import sys, domain_adapt.assets, domain_adapt.models; print([m for m in ('torch', 'transformers', 'boto3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
