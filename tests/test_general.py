"""General text: wikitext read as a reader sees it, every kind of file, and nothing broken lost in silence."""
import bz2
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from servers.hub import Hub

from domain_adapt import assets
from domain_adapt.params import UserError
from domain_adapt.sources.general import documents, hub_address, hub_documents, whole_words, wiki_text, wikitext_articles
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
    ("a\n====\nb", "a ==== b"),
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


@pytest.mark.fault
@pytest.mark.parametrize("part, end", [("<ref>", ""), ("<ref></ref ", ""), ("<ref>", "</ref>"), ("<!--", ""), ("<math>", ""),
    ("[http://a ", ""), ("[//", "a" * 2_000_000), ("=", "\t" * 2_000_000 + "x"), ("{{a|", ""), ("[[" * 200_000, "]]" * 200_000),
    ("( ", ""), ("'", ""), ("=a=\n", ""), ("* x\n", ""), ("{|\n", ""), ("__A", ""), (":;", "")])
def test_hostile_megabytes_come_to_an_end(part, end):
    started = time.process_time()
    wiki_text(part * (1 if len(end) > 100 else 2_000_000 // len(part)) + end)
    assert time.process_time() - started < 20


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


ROWS = [{"text": "one", "title": "T", "date": "2020-01-31T12:00:00Z"}, {"text": "two", "metadata": {"url": "u"}}, {
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
    assert found[0].metadata == dict(title="T", date="2020-01-31", url="") and found[1].metadata["url"] == "u"
    reasons = [d.metadata["filter_reason"].partition(":")[0] for d in found[2:]]
    assert reasons == ["no text field"] * 3 + ["broken JSON"] * 3 and found[-1].text == "caf\u00e9"


META = dict(url="https://a.org/1", timestamp="2022-08-31T02:05:17", language="en")


@pytest.mark.parametrize("row, about", [
    (dict(meta=META), dict(url="https://a.org/1", date="2022-08-31")),    # RedPajama
    (dict(meta=json.dumps(META), red_pajama_subset="arxiv"), dict(url="https://a.org/1", date="2022-08-31", source="arxiv")),
    (dict(meta=dict(redpajama_set_name="RedPajamaC4")), dict(source="RedPajamaC4")),    # SlimPajama
    (dict(timestamp="2019-04-25T12:57:54Z", url="u"), dict(url="u", date="2019-04-25")),    # C4
    (dict(metadata=dict(title="T", date="2020-02-30"), source="wiki"), dict(title="T", source="wiki")),
    (dict(title="own", meta=dict(title="inner"), metadata="{broken", url=["x"], date=20200131), dict(title="own"))])
def test_what_is_known_about_a_row(tmp_path, row, about):
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text="x") | row))
    pq.write_table(pa.Table.from_pylist([dict(text="x") | row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        [doc] = documents(tmp_path / name)
        assert (doc.text, doc.metadata) == ("x", dict(title="", date="", url="") | about)


@pytest.mark.parametrize("data, texts", [
    ('{"text": "a"}\n{"content": "b"}\n{"raw_content": "c"}\n', ["a", "b", "c"]), ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
    ('[\n {"text": "a"},\n {"text": "b"}\n]\n', ["a", "b"]), ('{\n "text": "a"\n}', ["a"]), ('\ufeff{"text": "a"}', ["a"]),
    ('{"text": "torn\n{"text": "b"}\n', [None, "b"]), ('["a", {"txt": 1}]', [None, None]), ("", []), ("5", [None])])
def test_json_files_of_every_layout(tmp_path, data, texts):
    (tmp_path / "a.json").write_text(data, encoding="utf-8")
    assert [None if "dropped" in d.metadata else d.text for d in documents(tmp_path / "a.json")] == texts


@pytest.mark.fault
def test_json_that_cannot_be_kept_as_it_is(tmp_path):
    deep = "[" * 1_000_000
    (tmp_path / "a.jsonl").write_text(f'{deep}\n{{"text": "a\\ud800b", "title": "\\udfff"}}\n{{"a":{deep}\n{{"text": "last"}}')
    found = list(documents(tmp_path / "a.jsonl"))
    assert [d.metadata.get("dropped") for d in found] == ["unreadable", None, "unreadable", None]
    assert found[1].text.encode().decode() == "a\ufffdb" and found[1].metadata["title"] == "\ufffd" and found[3].text == "last"
    (tmp_path / "a.json").write_text(deep)
    assert [d.metadata["dropped"] for d in documents(tmp_path / "a.json")] == ["unreadable"]


def packed(tmp_path, name, data):
    "The same file plain, compressed and in archives."
    for suffix, pack in {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}.items():
        (tmp_path / f"{name}{suffix}").write_bytes(pack(data))
        yield tmp_path / f"{name}{suffix}"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr(name, data)
    with tarfile.open(tmp_path / "a.tar", "w") as t: t.add(tmp_path / name, name)
    yield from (tmp_path / "a.zip", tmp_path / "a.tar")


def test_long_lines_however_packed(tmp_path):
    rows = [dict(text=f"{n} " + "word " * 2_000_000) for n in range(2)]
    for path in packed(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode()):
        assert [d.text for d in documents(path)] == [r["text"] for r in rows]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["one", None], "date": ["2020-05-01", None], "other": [1, 2]}), f := io.BytesIO())
    for path in packed(tmp_path, "a.parquet", f.getvalue()):
        one, none = documents(path)
        assert (one.text, one.metadata) == ("one", dict(title="", date="2020-05-01", url=""))
        assert none.metadata["filter_reason"] == "no text field"


@pytest.mark.parametrize("table, text", [
    (dict(id=["x"], content=["a"]), "a"), (dict(n=[1], body=["a"]), "a"), (dict(raw_content=["b"], text=["a"]), "a"),
    (dict(question=["x"], answer=["a"]), None), (dict(n=[1]), None)])
def test_the_column_of_text(tmp_path, table, text):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    if text: assert [d.text for d in documents(tmp_path / "a.parquet")] == [text]
    else:
        with pytest.raises(Unreadable, match=f"no text column among {', '.join(table)}"): list(documents(tmp_path / "a.parquet"))


WIKITEXT = """ 
 = Oxen = 
 
 Oxen ( plural of ox ) weigh 1 @,@ 900 kg , and " pull " well @-@ made carts . 
 They don 't eat 2 @.@ 5 % . 
 = = Empty = = 
 
 = = = Kinds / sorts = = = 
 
 the two drivers ' oxen , 1990 – 91 
 = not alone = 
 
 = Cows & co = 
 
 x = y 
"""


@pytest.mark.parametrize("name", ["wiki.train.raw", "wiki.test.tokens", "valid.txt"])
def test_wikitext_files(tmp_path, name):
    (tmp_path / name).write_text(WIKITEXT)
    found = [(d.metadata["title"], d.text) for d in documents(tmp_path / name)]
    assert found == [("Oxen", 'Oxen (plural of ox) weigh 1,900 kg, and "pull" well-made carts.\n\nThey don\'t eat 2.5%.\n\n'
                      "## Empty\n\n### Kinds/sorts\n\nthe two drivers' oxen, 1990–91\n\n= not alone ="), ("Cows & co", "x = y")]


def test_wikitext_of_the_hub_is_a_line_a_row(tmp_path):
    pq.write_table(pa.table({"text": ["", *WIKITEXT.splitlines(True)[1:]]}), tmp_path / "a.parquet")
    assert [d.metadata["title"] for d in documents(tmp_path / "a.parquet")] == ["Oxen", "Cows & co"]


@pytest.mark.parametrize("line, text", [
    ("Linnaeus ' idea of ' man ' .", "Linnaeus' idea of 'man'."), ("the ' 70s and ' 80s", "the '70s and '80s"),
    ('" a " and " b " ', '"a" and "b"'), ("at 5 ° C [ sic ] ; I 've £ 3", "at 5° C [sic]; I've £3"), ("1 – a", "1 – a"),
    ("", ""), ("@-@", "-"), ('"', '"')])
def test_words_are_put_together(line, text): assert whole_words(line) == text


@settings(max_examples=300, deadline=1000)
@given(st.lists(st.sampled_from([*"=,.()'\"/–", "@-@", "@.@", "word", "words", "12", "70s", "<unk>", "\n", "'s"]), max_size=40))
def test_words_lose_only_spaces_and_marks(words):
    source = " ".join(words)
    bare = lambda text: "".join(text.replace("@-@", "-").replace("@.@", ".").split())
    assert bare(whole_words(source)) == "".join({"@-@": "-", "@.@": "."}.get(w, w) for w in source.split())
    assert sum(d.text.count("word") + d.metadata["title"].count("word")
               for d in wikitext_articles(source.split("\n"))) <= source.count("word")


def test_the_real_wikitext(dev_data):
    found = list(documents(dev_data / "general" / "wikitext2" / "valid.txt"))
    assert len(found) == 60 and found[0].metadata["title"] == "Homarus gammarus"
    text = "\n".join(d.text for d in found)
    assert not re.findall(r" [,.;:!?)%](?=\s)|\( |@[-,.]@| 's\b(?! )|= =", text)
    assert "weigh 0.7–2.2 kg (1.5–4.9 lb)" in text and 'becoming "lobster red" on cooking' in text


def test_real_collections(dev_data):
    arxiv = list(documents(dev_data / "general" / "arxiv" / "arxiv.jsonl"))
    assert len(arxiv) == 20 and {d.metadata["date"][:5] for d in arxiv} <= {f"20{n:02}-" for n in range(7, 25)}
    assert all(d.metadata["url"].startswith("https://arxiv.org/abs/") for d in arxiv)
    assert [bool(d.text) for d in documents(dev_data / "general" / "c4" / "c4_demo.jsonl")] == [True] * 300


def test_plain_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo €\n".encode("cp1252"))
    (tmp_path / "a.cor").write_text("one\ntwo\n")
    assert [d.text for d in documents(tmp_path / "a.txt")] == ["one\ntwo €"]
    assert [d.text for d in documents(tmp_path / "a.cor")] == ["one", "two"]
    (tmp_path / "a.pdf").touch()
    assert next(documents(tmp_path / "a.pdf")).metadata["filter_reason"] == "unknown kind of file .pdf"


LINES, PAGES = b'{"text": "one"}\n' * 500, dump(*[page("A", "one")] * 500).encode()


@pytest.mark.fault
@pytest.mark.parametrize("name, whole", [("a.jsonl.gz", gzip.compress(LINES, mtime=0)), ("a.xml.bz2", bz2.compress(PAGES)),
                                         ("a.xml", PAGES), ("a.jsonl.zst", zstd(LINES))], ids=["gz", "bz2", "xml", "zst"])
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


# --- datasets of the hub, from a server that answers as it does ---

def parquet(**columns) -> bytes:
    pq.write_table(pa.table(columns), f := io.BytesIO())
    return f.getvalue()


def c4(n: int) -> bytes:
    rows = [dict(text=f"c{n}.{i}", url=f"u{i}", timestamp="2019-04-25T12:57:54Z") for i in range(4)]
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


CARD = b"""---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.*}, {split: validation, path: en/valid.*}]
- config_name: de
  data_files: [{split: train, path: de/*}]
---
"""
BIG = gzip.compress("\n".join(json.dumps(dict(text=os.urandom(5000).hex())) for _ in range(3000)).encode(), 1)
REPOSITORIES = {
    "own/table": {f"data/train-{i:05}-of-00003.parquet": parquet(text=[f"t{i}.{n}" for n in range(5)], url=["u"] * 5)
                  for i in range(3)},
    "own/c4": {"README.md": CARD, "de/train.0.json.gz": c4(9), "en/valid.0.json.gz": c4(8),
               **{f"en/train.{n}.json.gz": c4(n) for n in range(2)}},
    "own/wiki": {"train.parquet": parquet(text=WIKITEXT.splitlines(True))}, "own/pairs": {"train.jsonl": b'{"q": "a", "a": "b"}'},
    "own/big": {"train.jsonl.gz": BIG}, "own/torn": {"train.jsonl.gz": BIG[:100_000]}, "own/none": {"model.bin": b"0"}}
ASK = """import json, sys
from domain_adapt.sources.general import hub_documents
for call in json.loads(sys.argv[1]):
    try: print(json.dumps([[d.id, d.text[:100], d.metadata] for d in hub_documents(*call)]))
    except Exception as e: print(json.dumps([type(e).__name__, str(e)]))"""


def ask(tmp_path, endpoint, *calls, **env) -> list:
    "What `hub_documents` gives for each call, from a process that knows this hub and has an empty cache."
    env = os.environ | dict(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path), PYTHONWARNINGS="ignore") | env
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(calls)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_of_the_hub(tmp_path):
    with Hub(REPOSITORIES) as hub:
        english, valid, wiki = ask(tmp_path, hub.endpoint, ["hub:own/c4/en"], ["hub:own/c4/en@validation"], ["hub:own/wiki"])
    assert [(i, t) for i, t, _ in english] == [(f"{n}#{i}", f"c{n}.{i}") for n in range(2) for i in range(4)]
    assert english[1][2] == dict(title="", date="2019-04-25", url="u1") and [t for _, t, _ in valid] == [f"c8.{i}" for i in range(4)]
    assert [m["title"] for _, _, m in wiki] == ["Oxen", "Cows & co"]


def test_ranks_share_a_dataset_without_gap_or_repeat(tmp_path):
    sizes, limits = (1, 2, 4), (None, 4, 99)
    calls = [["hub:own/table", r, size, limit] for limit in limits for size in sizes for r in range(size)]
    with Hub(REPOSITORIES) as hub: found = iter(ask(tmp_path, hub.endpoint, *calls))
    every = [(f"{f}#{n}", f"t{f}.{n}") for f in range(3) for n in range(5)]
    for limit in limits:
        for size in sizes:
            shares = [[(i, t) for i, t, _ in next(found)] for _ in range(size)]
            assert sorted(x for share in shares for x in share) == every[:limit]
            if limit or size > 3: assert max(map(len, shares)) - min(map(len, shares)) <= 1
            else: assert all(len({i[0] for i, _ in share}) * 5 == len(share) for share in shares)    # whole files


def test_a_limit_reads_no_more_than_it_needs(tmp_path):
    with Hub(REPOSITORIES) as hub:
        [few] = ask(tmp_path, hub.endpoint, ["hub:own/big", 0, 1, 3])
        parts = [r for _, path, r in hub.log if r and path.endswith("train.jsonl.gz")]
    ends = [int(r.partition("-")[2]) for r in parts]
    assert len(few) == 3 and len(BIG) > 12_000_000 and ends and max(ends) < len(BIG) * 0.6


@pytest.mark.fault
def test_what_the_hub_does_not_have_is_named(tmp_path):
    asked = {"hub:no/such": "doesn't exist on the Hub", "hub:own/c4": "pick one among the available configs: ['en', 'de']",
             "hub:own/c4/fr": "'fr' not found", "hub:own/table@dev": "Available splits: ['train']", "hub:own/none": "No (supported) data",
             "hub:own/pairs": "no text column among q, a"}
    with Hub(REPOSITORIES) as hub: found = ask(tmp_path, hub.endpoint, *([a] for a in asked))
    for (address, words), (kind, said) in zip(asked.items(), found, strict=True):
        assert kind == "UserError" and said.startswith(f"{address}: ") and words in said and "folder instead" in said


@pytest.mark.fault
def test_a_dataset_that_breaks_off_says_so(tmp_path):
    with Hub(REPOSITORIES) as hub: [[kind, said]] = ask(tmp_path, hub.endpoint, ["hub:own/torn"])
    assert kind == "UserError" and said.startswith("hub:own/torn: cannot be read")


@pytest.mark.fault
@pytest.mark.parametrize("env", [dict(HF_HUB_OFFLINE="1"), pytest.param({}, marks=pytest.mark.slow)])
def test_no_hub_at_all(tmp_path, monkeypatch, env):
    [[kind, said]] = ask(tmp_path, "http://127.0.0.1:1", ["hub:own/c4/en"], **env)
    assert kind == "UserError" and "hub:own/c4/en: cannot be read from http://127.0.0.1:1" in said and "their folder" in said
    monkeypatch.setenv("DOMAIN_ADAPT_OFFLINE", "1")
    with pytest.raises(UserError, match="DOMAIN_ADAPT_OFFLINE=1"): next(hub_documents("hub:own/c4/en"))


def test_a_folder_of_the_same_name_is_not_taken_for_a_dataset(tmp_path):
    (tmp_path / "own" / "table").mkdir(parents=True)
    (tmp_path / "own" / "table" / "train.jsonl").write_text('{"text": "local"}')
    with Hub(REPOSITORIES) as hub, pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        [found] = ask(tmp_path, hub.endpoint, ["hub:own/table", 0, 1, 1])
    assert found[0][1] == "t0.0"


@pytest.mark.parametrize("address, parts", [("hub:a/b", ("a/b", None, "train")), ("hub:a/b/c@d", ("a/b", "c", "d")),
    ("hub:a/b@d", ("a/b", None, "d")), ("hub:a/b/c/d", ("a/b", "c/d", "train"))])
def test_addresses(address, parts): assert hub_address(address) == parts


@pytest.mark.parametrize("address", ["hub:", "hub:a", "hub:a/", "a/b", "hub:a/b@", "hub:../x y"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="write it as hub:OWNER/NAME"): hub_address(address)
