"""Folders in S3, on real servers: what is listed is what is read, wherever it changes meanwhile."""
import gzip
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import botocore.exceptions
import pytest

from domain_adapt import s3
from domain_adapt.params import UserError

from servers.s3 import KEY, SECRET, ceph, has_ceph, rclone

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["rclone", "ceph"])
def server(request, tmp_path_factory):
    "Name and endpoint of an S3 server."
    if request.param == "ceph" and not has_ceph(): pytest.skip("Ceph is not installed (apt: ceph-mon ceph-osd radosgw)")
    with {"rclone": rclone, "ceph": ceph}[request.param](tmp_path_factory.mktemp(request.param) / "at") as endpoint:
        yield request.param, endpoint


@pytest.fixture
def bucket(server, monkeypatch, request):
    "A new bucket, with a client for it."
    monkeypatch.setenv("AWS_ENDPOINT_URL", server[1])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3._client.cache_clear()
    name = "b" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    s3.client().create_bucket(Bucket=name)
    return name


def put(bucket: str, **objects: bytes) -> None:
    client = s3.client()
    for key, body in objects.items(): client.put_object(Bucket=bucket, Key=key, Body=body)


def test_a_listing_has_more_pages_than_one(bucket):
    client = s3.client()
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda n: client.put_object(Bucket=bucket, Key=f"in/{n:04d}", Body=b"x"), range(1030)))
    put(bucket, **{"in2/not": b"y", "in/deep/er": b"zz"})
    found = s3.listing(f"s3://{bucket}/in")
    assert len(found) == 1031 and found[0].path == "0000" and found[-1][:3] == ("deep/er", f"s3://{bucket}/in/deep/er", 2)
    one, = s3.listing(f"s3://{bucket}/in2/not")
    assert one.path == "not" and s3.listing(f"s3://{bucket}/none") == [] and len(s3.listing(f"s3://{bucket}")) == 1032


@pytest.mark.fault
def test_what_vanishes_or_changes_is_told(bucket, tmp_path):
    put(bucket, a=b"one", b=b"two", c=b"three")
    a, b, c = s3.listing(f"s3://{bucket}")
    put(bucket, a=b"new")
    s3.client().delete_object(Bucket=bucket, Key="b")
    with pytest.raises(s3.Gone, match="changed"): s3.download(a, tmp_path / "a")
    with pytest.raises(s3.Gone, match="vanished"): s3.download(b, tmp_path / "b")
    s3.download(c, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"three"


@pytest.mark.fault
def test_wrong_credentials_name_the_way_out_and_no_secret(bucket, monkeypatch, tmp_path):
    put(bucket, a=b"one")
    item, = s3.listing(f"s3://{bucket}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3._client.cache_clear()
    for ask in (lambda: s3.listing(f"s3://{bucket}"), lambda: s3.download(item, tmp_path / "x"), lambda: s3.upload(tmp_path, f"s3://{bucket}/y", {})):
        with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as e: ask()
        assert f"s3://{bucket}" in str(e.value) and "wrong-secret" not in str(e.value)


def folder_of(at: Path, **files: bytes) -> dict[str, dict]:
    for name, data in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(data)
    return {n: dict(bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in files.items()}


def test_a_copy_is_whole_when_its_marker_is_there(bucket, server, tmp_path):
    big = bytes(range(256)) * (90 << 10)    # 23 MB, sent in parts
    files = folder_of(tmp_path, **{"documents/sec/00000.jsonl.gz": big, "funnel.csv": b"corpus\n"})
    at = f"s3://{bucket}/runs/ingest-1"
    assert s3.upload(tmp_path, at, files) == 2 and s3.upload(tmp_path, at, files) == 0
    copied = {i.path: i for i in s3.listing(at)}
    assert set(copied) == {*files, s3.COMPLETE}
    s3.download(copied["documents/sec/00000.jsonl.gz"], tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big
    listed = json.loads(s3.client().get_object(Bucket=bucket, Key=f"runs/ingest-1/{s3.COMPLETE}")["Body"].read())
    assert listed == files
    s3.client().delete_object(Bucket=bucket, Key="runs/ingest-1/funnel.csv")
    assert s3.upload(tmp_path, at, files) == 1    # goes on where it stopped
    if server[0] == "ceph":    # which knows conditional writes
        (tmp_path / "funnel.csv").write_bytes(b"other\n")
        with pytest.raises(UserError, match="another copy is complete"): s3.upload(tmp_path, at, folder_of(tmp_path, **{"funnel.csv": b"other!\n"}))


def test_an_endpoint_that_is_no_address_is_named_without_its_login(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://jo:swordfish@my_store:9000")
    s3._client.cache_clear()
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: Invalid endpoint.*write http") as told: s3.listing("s3://bucket/folder")
    assert "swordfish" not in str(told.value)
    s3._client.cache_clear()
