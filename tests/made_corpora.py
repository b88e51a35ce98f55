"""Small corpora with one of everything, shared by the tests of ingest."""
import gzip
import json
from pathlib import Path

import pandas as pd

from domain_adapt.clean import ingest
from domain_adapt.params import Params, validate

STORY = ("Before dawn the {who} of {town} carried {n} heavy baskets down to the river, sold them for a few "
         "coins and spent the evening in an inn where travellers told stories about wolves and snow; nobody "
         "believed a word, yet when morning came each door was barred.")
PEOPLE = "baker smith weaver miller carter fisher".split()


def story(n: int) -> str: return STORY.format(who=PEOPLE[n % 6], town=PEOPLE[n // 6 % 6].title(), n=n)


def filing(form: str, company: str, words: str) -> str:
    facts = {"DocumentType": form, "EntityRegistrantName": company}
    told = "".join(f'<p><ix:nonNumeric name="dei:{k}">{v}</ix:nonNumeric></p>' for k, v in facts.items())
    row = "<tr><td>{}</td><td>{}</td></tr>"
    return f"<html>{told}<p>{words}</p><table>{row.format('Sales', 1)}{row.format('Costs', 2)}</table></html>"


def some_filings(folder: Path) -> None:
    "Three that are kept; an amendment, a copy, a short one, a torn submission, a picture and a hidden file."
    (folder / "2025").mkdir(parents=True)
    (folder / "a.html").write_text(filing("10-K", "A", story(1)))
    (folder / "amended.html").write_text(filing("10-K/A", "A", story(2)))
    (folder / "2025" / "b.htm").write_text(filing("10-K", "B", story(3)))
    (folder / "copy.html").write_text(filing("10-K", "B", story(3)).replace("<p>", "<p>\n "))
    (folder / "next.html").write_text(filing("10-K", "B", story(3)).replace("<td>2<", "<td>3<"))
    (folder / "short.html").write_text("<p>FORM 10-K</p>")
    (folder / "all.txt").write_text("<DOCUMENT><TYPE>10-K<TEXT>x")
    (folder / "logo.jpg").write_bytes(b"\xff\xd8\x00")
    (folder / ".DS_Store").write_bytes(b"\x00")


def some_prose(folder: Path) -> None:
    "Thirteen that are kept; broken, short, empty, noisy, repetitive, repeated; pages that are no articles."
    (folder / "b").mkdir(parents=True)
    lines = [json.dumps({"text": story(n), "title": f"T{n}"}) for n in range(12)]
    noise = json.dumps({"text": "the $ % 1 2 to & 3 of " * 12})
    (folder / "a.jsonl").write_text("\n".join([*lines[:6], '{"text": "bro', json.dumps({
        "text": "Too short."})]))
    (folder / "b" / "c.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[4:], noise]).encode()))
    (folder / "d.txt").write_text(story(20) + "\n" + "All work and no play makes Jack a dull boy. " * 12)
    (folder / "e.txt").write_text("")
    page = "<page><title>{0}</title><ns>{1}</ns><revision><text>{2}</text></revision></page>"
    pages = page.format("A", 0, story(30)) + page.format("B", 0, "#REDIRECT [[A]]") + page.format("C", 1,
        story(31))
    (folder / "w.xml").write_text(f"<mediawiki>{pages}</mediawiki>")


def corpus(source: str, path: Path | str, kind: str = "domain", **more) -> dict:
    return dict(kind=kind, source=source, path=str(path), **more)


def params(root: Path, workers: int = 1, ingest: dict | None = None, **corpora: dict) -> Params:
    default = dict(sec=corpus("sec", root / "sec", forms=["10-K"]), prose=corpus("general", root / "prose",
        "general"))
    merge = {"candidates": [dict(name="a", method="linear", weight=0.5)]}
    return validate(dict(run="t", model="m", corpora=corpora or default, tokens={"replay": 0}, merge=merge,
                         ingest={"workers": workers, "min_words": 20, "max_failed_fraction": 0.2} | (ingest or {})))


def run(p: Params, out: Path) -> pd.DataFrame:
    out.mkdir()
    ingest(p, {}, out)
    return pd.read_csv(out / "funnel.csv")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for f in sorted(folder.rglob("*.jsonl.gz")) for line in gzip.open(f)]


def result(out: Path) -> dict[str, bytes]:
    "Every file that the stage leaves, but its logs."
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file() and "logs" not in f.parts}
