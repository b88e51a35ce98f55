"""What a folder of the world's files holds: each is quarantined with a reason, and the run goes on."""
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from domain_adapt import workers
from made_corpora import corpus, filing, params, records, run, story

pytestmark = pytest.mark.fault

BOMB = ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "ha">' + "".join(f'<!ENTITY x{n} "{f"&x{n - 1 or str()};" * 10}">' for n in range(1, 12))
        + "]>{}")
SUBMISSION = """<SEC-DOCUMENT>0000000042-25-000001.txt : 20250101
<SEC-HEADER>
CONFORMED SUBMISSION TYPE:	10-K
FILER:
	COMPANY DATA:
		COMPANY CONFORMED NAME:			WIDGETS INC
		CENTRAL INDEX KEY:			0000000042
</SEC-HEADER>
"""
DOCUMENT = "<DOCUMENT>\n<TYPE>10-K\n<SEQUENCE>1\n<FILENAME>a.htm\n<TEXT>\n{}\n</TEXT>\n"


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def ingest(tmp_path: Path, source: str, files: dict[str, bytes | str], **more) -> dict[str, str]:
    "Reason, or `kept`, of each document."
    for name, data in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    p = params(tmp_path, ingest={"max_failed_fraction": 1.0, "min_words": 5, "timeout": 20.0, **more}, x=corpus(source, tmp_path / "in"))
    table = run(p, tmp_path / "out").set_index("step")["documents"]
    found = {d["id"].removeprefix("x/"): "kept" for d in records(tmp_path / "out" / "documents")}
    found |= {d["id"].removeprefix("x/"): d["metadata"]["filter_reason"] for d in records(tmp_path / "out" / "dropped")}
    assert len(found) == table["read"]
    return found


def test_filings(tmp_path):
    good = filing("10-K", "Good", story(1))
    found = ingest(tmp_path, "sec", {
        "a-good.htm": good, "cut.htm.gz": gzip.compress(good.encode() * 50)[:-30], "empty.txt": b"", "binary.txt": bytes(range(256)) * 400,
        "unclosed.txt": SUBMISSION + DOCUMENT.format(filing("10-K", "A", story(2))) + DOCUMENT.format(filing("10-K", "B", story(3))),
        "lower.txt": (SUBMISSION + DOCUMENT.format(f"<p>{story(4)}</p>")).replace("<TYPE>", "<type>").replace("DOCUMENT>\n<t", "document>\n<t"),
        "mixed.htm": f"<p>{story(5)} caf".encode() + b"\xe9 \xe2\x82\xac 5 \x93quoted\x94.</p>", "notes.pdf": b"%PDF-1.4\n\xe2\xe3",
        "climbs.tar.gz": archive(**{"../../escaped.htm": filing("10-K", "C", story(6)).encode(), "/etc/x.htm": filing("10-K", "D", story(7)).encode()})})
    kept = {n for n, why in found.items() if why == "kept"}
    assert {"a-good.htm#0", "unclosed.txt#0", "unclosed.txt#1", "lower.txt#0", "mixed.htm#0", "climbs.tar.gz#0", "climbs.tar.gz#1"} <= kept, found
    assert found["cut.htm.gz#0"].startswith("damaged: EOFError") and found["notes.pdf#0"] == "unknown kind of file .pdf"
    assert {"empty.txt#0", "binary.txt#0"} <= found.keys() - kept
    assert "café €5 “quoted”." in next(d["text"] for d in records(tmp_path / "out" / "documents") if "mixed" in d["id"])
    assert not (tmp_path.parent / "escaped.htm").exists() and not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("source, name, text", [
    ("medical", "bomb.nxml", BOMB.format("<article><front><article-meta><title-group><article-title>&x11;</article-title></title-group>"
                                         "</article-meta></front><body><p>&x11;</p></body></article>")),
    ("patents", "bomb.xml", BOMB.replace("DOCTYPE a", "DOCTYPE us-patent-grant").format("<us-patent-grant><description><p>&x11;</p></description></us-patent-grant>")),
    ("general", "bomb.xml", BOMB.format("<mediawiki><page><title>a</title><ns>0</ns><revision><text>&x11;</text></revision></page></mediawiki>")),
    ("sec", "bomb.xml", BOMB.format("<ownershipDocument><issuer><issuerName>&x11;</issuerName></issuer></ownershipDocument>"))])
def test_an_entity_bomb_does_not_go_off(tmp_path, source, name, text):
    other = {"sec": ("a.htm", filing("10-K", "Good", story(1))), "general": ("a.txt", story(1)), "medical": ("a.txt", story(1)),
             "patents": ("a.txt", story(1))}[source]
    ingest_with = {name: text, other[0]: other[1]}
    if source in ("medical", "patents"):
        with pytest.raises(Exception, match="no document is left|could not be read"): ingest(tmp_path, source, {name: text})
        return
    found = ingest(tmp_path, source, ingest_with)
    assert found[f"{other[0]}#0"] == "kept" and not any(len(d["text"]) > 10_000 for d in records(tmp_path / "out"))


def test_a_huge_page_and_one_that_hangs_cost_only_themselves(tmp_path):
    "200 MB of HTML, and tables nested until a parser or we give up, at a limit of a few seconds."
    nested = "<table><tr><td>" * 60_000 + "x 5"
    found = ingest(tmp_path, "sec", {"a.htm": filing("10-K", "A", story(1)), "huge.htm": b"<html><body>" + b"<p>word 5</p>" * 16_000_000,
                                     "nested.htm": nested, "z.htm": filing("10-K", "Z", story(2))}, timeout=15.0)
    assert found["a.htm#0"] == found["z.htm#0"] == "kept"
    assert "MB" in found["huge.htm#0"] or "longer than" in found["huge.htm#0"]
    assert "nested.htm#0" in found


def test_general_text(tmp_path):
    found = ingest(tmp_path, "general", {
        "a.jsonl": json.dumps({"text": story(1)}) + "\n{broken\n" + json.dumps({"words": "x"}), "cut.jsonl.gz": gzip.compress((json.dumps({"text": story(2)}) + "\n").encode() * 400)[:-9],
        "empty.jsonl": b"", "latin.txt": (story(3) + " café").encode("cp1252"), "no.parquet": b"PAR1nonsense", "x.zip": b"PK\x03\x04broken"})
    assert found["a.jsonl#0"] == found["latin.txt#0"] == "kept" and found["a.jsonl#1"].startswith("broken JSON")
    assert found["a.jsonl#2"] == "no text field" and found["no.parquet#0"].startswith("damaged: Arrow") and found["x.zip#0"].startswith("damaged: BadZip")
    assert any(why.startswith("damaged: EOFError") for n, why in found.items() if n.startswith("cut"))


def test_a_compression_bomb_costs_its_file(tmp_path, monkeypatch):
    "A megabyte that unpacks to a gigabyte: its reader runs out of the memory it may have."
    monkeypatch.setattr(workers, "MEMORY", 400 << 20)
    found = ingest(tmp_path, "general", {"a.txt": story(1), "bomb.txt.gz": gzip.compress(bytes(1 << 30), 1), "z.txt": story(2)})
    assert found["a.txt#0"] == found["z.txt#0"] == "kept" and found["bomb.txt.gz#0"].startswith("damaged: MemoryError")
