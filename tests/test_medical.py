"""Articles and abstracts: every figure kept, metadata checked by hand, damage loses one document."""
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from domain_adapt.sources.markdown import fidelity
from domain_adapt.sources.medical import articles, date_of, documents, on_topic, topic
from domain_adapt.sources.reading import DAMAGE

# What a reader of the printed article sees: written as its own walk over the raw tree, without the rules under test.
UNSEEN = {"graphic", "inline-graphic", "media", "object-id", "permissions", "alt-text", "long-desc", "ref-list"}
INLINE = {"italic", "bold", "xref", "ext-link", "underline", "email", "named-content", "monospace", "sc", "styled-content",
          "inline-formula", "uri", "roman", "strike", "alternatives", "abbrev", "overline"}


def visible(el) -> str:
    name = etree.QName(el).localname
    if name in UNSEEN: return ""
    if name == "tex-math": return " " + re.sub(r".*\\begin\{document\}|\\end\{document\}.*", "", el.text or "", flags=re.S) + " "
    if name == "math" and el.getparent().find("{*}tex-math") is not None: return ""
    edge = "" if name in INLINE else " " if name in ("sup", "sub") else "\n"
    inner = (el.text or "") + "".join((visible(x) if isinstance(x.tag, str) else "") + (x.tail or "") for x in el)
    return edge + inner + edge


def truth(data: bytes) -> str:
    root = etree.fromstring(data, etree.XMLParser(load_dtd=False, no_network=True, resolve_entities=False))
    paths = ["front/article-meta/title-group/article-title", "front/article-meta/title-group/subtitle",
             "front/article-meta/abstract", "body", "floats-group", "back/app-group", "back/app", "back/glossary"]
    return "\n".join(visible(el) for p in paths for el in root.findall("/".join("{*}" + x for x in p.split("/"))))


def test_no_figure_of_an_article_is_lost_or_invented(dev_data):
    files = sorted((dev_data / "medical" / "jats").glob("*.nxml"))
    assert len(files) == 10
    for f in files:
        doc, = documents(f)
        found = fidelity(truth(f.read_bytes()), doc.text)
        assert (found.kept, found.invented) == (found.body, 0) and found.body > 150, (f.name, found)


def test_metadata_checked_by_hand(dev_data):
    doc, = documents(dev_data / "medical" / "jats" / "BMC Dev Biol-6-_-1420271.nxml")
    want = dict(title="Identification and targeted disruption of the mouse gene encoding ESG1 (PH34/ECAT2/DPPA5)",
                date="2006-02-28", url="https://doi.org/10.1186/1471-213X-6-11", pmcid="PMC1420271", pmid="16504174",
                doi="10.1186/1471-213X-6-11", journal="BMC Developmental Biology", article_type="research-article",
                licence="http://creativecommons.org/licenses/by/2.0", subjects="Research Article")
    assert doc.metadata == want
    assert "Despite specific expression in early embryos and germ cells, ESG1^-/- mice developed normally" in doc.text
    assert doc.text.startswith(f"# {want['title']}\n\n## Abstract\n\n### Background\n\nEmbryonic stem cell-specific gene (ESG) 1,")
    assert "292154" not in doc.text and "Evans" not in doc.text and "We thank" not in doc.text


def test_a_table_of_an_article(dev_data):
    doc, = documents(dev_data / "medical" / "jats" / "BMC Dev Biol-4-_-341451.nxml")
    assert """Table 1. Whole body and lung weights of mouse embryos

|  | E13.5 |  | E18.5 |  |
|---|---|---|---|---|
|  | Dhcr7^+/+ | Dhcr7^-/- | Dhcr7^+/+ | Dhcr7^-/- |
| N | 10 | 4 | 17 | 8 |
| Wet BW (mg) | 142 ± 0.21 | 138 ± 11 | 1015.3 ± 12 | 825.7 ± 14 * |""" in doc.text


def one(xml: str | bytes, name=""):
    found = list(articles(io.BytesIO(xml.encode() if isinstance(xml, str) else xml), name))
    assert len(found) == 1
    return found[0]


FRONT = "<front><article-meta>%s<title-group><article-title>T</article-title></title-group></article-meta></front>"
ARTICLE = f"<article>{FRONT % ''}<body><p>%s</p></body></article>"


@pytest.mark.parametrize("inside, want", [
    ("H<sub>2</sub>O at 10<sup>6</sup> [<xref>3</xref>,<xref>4</xref>]", "H2O at 10^6 [3,4]"),
    ("x <inline-formula><alternatives><tex-math>\\documentclass[12pt]{m}\\begin{document}$x^2$\\end{document}</tex-math>"
     "<mml:math xmlns:mml='m'><mml:mi>x</mml:mi></mml:math><graphic/></alternatives></inline-formula> y", "x $x^2$ y"),
    ("<disp-formula><label>(1)</label><mml:math xmlns:mml='m'><mml:mfrac><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:mfrac></mml:math>"
     "</disp-formula>z", "(1) 1/2\n\nz"),
    ("a<list list-type='bullet'><list-item><p>b</p></list-item><list-item><p>c</p></list-item></list>d", "a\n\n- b\n- c\n\nd"),
    ("<def-list><def-item><term>AKI</term><def><p>acute kidney injury</p></def></def-item></def-list>", "- AKI: acute kidney injury"),
    ("5<inline-graphic/>10 <ext-link>http://a</ext-link><!-- 99 --><?pi 98?>", "5 10 http://a"),
    ("<fig><label>Fig. 1</label><caption><title>A.</title><p>B <xref>2</xref></p></caption><alt-text>77</alt-text></fig>", "Fig. 1. A.\n\nB 2"),
    ("<table-wrap><label>Table 1</label><caption><p>C</p></caption><table><thead><tr><th/><th>n</th></tr></thead><tbody><tr><td>a<sup>*</sup></td>"
     "<td>5</td></tr></tbody></table><table-wrap-foot><fn><label>*</label><p>d</p></fn></table-wrap-foot></table-wrap>",
     "Table 1. C\n\n|  | n |\n|---|---|\n| a^* | 5 |\n\n* d")])
def test_body(inside, want): assert one(ARTICLE % inside).text == f"# T\n\n{want}"


def test_wrapped_prefixed_and_concatenated_articles():
    prefixed = re.sub(r"<(/?)(?=\w)", r"<\1j:", ARTICLE % "5 mg")
    plain = ARTICLE % "6 mg <ext-link xlink:href='http://a'>b</ext-link>"
    wrapped = f"<?xml version='1.0'?><pmc-articleset xmlns:xlink='x' xmlns='y' xmlns:j='z'>{plain}{prefixed}{ARTICLE % '7'}</pmc-articleset>"
    found = list(articles(io.BytesIO(wrapped.encode())))
    assert [d.text for d in found] == ["# T\n\n6 mg b", "# T\n\n5 mg", "# T\n\n7"]


def test_what_an_article_without_a_body_is():
    with_abstract = f"<article article-type='retraction'>{(FRONT % '').replace('</article-meta>', '<abstract><title>Summary</title><p>A.</p></abstract></article-meta>')}</article>"
    doc = one(with_abstract)
    assert doc.text == "# T\n\n## Summary\n\nA." and doc.metadata["article_type"] == "retraction" and "dropped" not in doc.metadata
    empty = one(f"<article>{FRONT % ''}<back><ref-list><ref>1</ref></ref-list></back></article>")
    assert (empty.metadata["dropped"], empty.metadata["filter_reason"], empty.metadata["title"]) == ("not text", "no text", "T")
    assert one("<article><body/></article>").metadata["filter_reason"] == "an article without its front matter"
    assert one("<html/>").metadata["filter_reason"] == "no article in it" == one(b"").metadata["filter_reason"]


def test_article_fields():
    meta = ("<article-id pub-id-type='pmc'>123</article-id><article-categories><subj-group><subject>Review</subject></subj-group></article-categories>"
            "<pub-date pub-type='pmc-release'><day>1</day><month>1</month><year>1999</year></pub-date><pub-date><month>5</month><year>2004</year></pub-date>"
            "<permissions><license xmlns:ali='a'><ali:license_ref>https://creativecommons.org/licenses/by/4.0/</ali:license_ref></license></permissions>"
            "<kwd-group><kwd>Lung</kwd><kwd>Review</kwd></kwd-group>")
    doc = one(f"<article>{FRONT % meta}<body><p>a</p></body></article>")
    assert {k: v for k, v in doc.metadata.items() if v} == dict(
        title="T", date="2004-05", url="https://www.ncbi.nlm.nih.gov/pmc/articles/PMC123/", pmcid="PMC123",
        licence="https://creativecommons.org/licenses/by/4.0/", subjects="Review; Lung")
    assert one(ARTICLE % "a", "oa/PMC98765.xml").metadata["pmcid"] == "PMC98765"


def test_dates():
    assert [date_of(*d) for d in [("2005", "13"), ("2005", "Feb", "29"), ("2004", "2", "29"), ("", ""), ("2001 Winter", ""), ("12005",)]] == [
        "2005", "2005-02", "2004-02-29", "", "2001", ""]


CITATION = """<PubmedArticle><MedlineCitation Status="MEDLINE"><PMID Version="1">%s</PMID><Article><Journal><JournalIssue><PubDate>
<MedlineDate>2000 Mar-Apr</MedlineDate></PubDate></JournalIssue><Title>J &amp; K</Title></Journal><ArticleTitle>[On H<sub>2</sub>O].</ArticleTitle>%s
<ArticleDate><Year>2000</Year><Month>03</Month><Day>09</Day></ArticleDate><PublicationTypeList><PublicationType>Retracted Publication</PublicationType>
</PublicationTypeList></Article></MedlineCitation><PubmedData><ArticleIdList><ArticleId IdType="pubmed">%s</ArticleId><ArticleId IdType="doi">10.1/a</ArticleId>
</ArticleIdList><ReferenceList><Reference><ArticleIdList><ArticleId IdType="pmc">PMC1</ArticleId></ArticleIdList></Reference></ReferenceList></PubmedData></PubmedArticle>"""
ABSTRACT = "<Abstract><AbstractText Label='METHODS' NlmCategory='METHODS'>We drank 5 ml.</AbstractText><AbstractText>So.</AbstractText></Abstract>"


def test_pubmed(tmp_path):
    pages = [CITATION % (1, ABSTRACT, 1), CITATION % (2, "", 2), "<DeleteCitation><PMID>8</PMID>\n<PMID>9</PMID></DeleteCitation>"]
    whole = f"<?xml version='1.0'?><!DOCTYPE PubmedArticleSet PUBLIC '-//NLM' 'http://x.dtd'><PubmedArticleSet>{''.join(pages)}</PubmedArticleSet>"
    (path := tmp_path / "pubmed24n0001.xml.gz").write_bytes(gzip.compress(whole.encode()))
    doc, *others = documents(path)
    assert doc.text == "# On H2O.\n\n## Abstract\n\n### Methods\n\nWe drank 5 ml.\n\nSo."
    assert doc.metadata == dict(title="On H2O.", date="2000-03-09", url="https://doi.org/10.1/a", pmcid="", pmid="1", doi="10.1/a", journal="J & K",
                                licence="", article_type="Retracted Publication", subjects="")
    assert [(d.metadata["filter_reason"], d.metadata["pmid"], d.metadata["dropped"]) for d in others] == [
        ("no abstract", "2", "not text"), ("deleted citation", "8", "not text"), ("deleted citation", "9", "not text")]


def test_packed_and_other_files(tmp_path):
    with tarfile.open(path := tmp_path / "oa_comm.tar.gz", "w:gz") as t:
        for name, data in {"PMC1/a.nxml": (ARTICLE % "1").encode(), "PMC1/fig.jpg": b"x", "b.nxml": b"<article>", "book.md": b"# Lungs\n\nThey breathe.",
                           "c.txt": "caf\xe9".encode("cp1252"), "d.txt": b"\0\1"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    found = list(documents(path))
    assert [d.metadata.get("filter_reason", d.text) for d in found] == [
        "# T\n\n1", "unknown kind of file .jpg", "article: breaks off before </article>", "# Lungs\n\nThey breathe.", "caf\xe9", "not text"]
    assert found[3].metadata["title"] == "Lungs" and set(found[3].metadata) == set(found[0].metadata)


def test_plain_text_of_real_articles(dev_data):
    found = [doc for f in sorted((dev_data / "medical" / "craft_txt").glob("*.txt")) for doc in documents(f)]
    assert len(found) == 49 and all(d.metadata["title"] and len(d.text) > 10_000 for d in found)


@pytest.mark.fault
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4000), st.booleans())
def test_a_file_that_breaks_off_keeps_what_came_before(at, packed):
    whole = "".join(ARTICLE % n for n in range(10)).encode() + (CITATION % (1, ABSTRACT, 1)).encode() * 2
    data = whole[:at % len(whole)]
    if packed:
        broken = gzip.compress(whole)
        broken = broken[:at % len(broken)]
        file, data = gzip.GzipFile(fileobj=io.BytesIO(broken)), zlib.decompressobj(31).decompress(broken)
    else: file = io.BytesIO(data)
    found = []
    try: found += articles(file)
    except DAMAGE: assert packed
    kept = [d for d in found if "dropped" not in d.metadata]
    assert [d.text for d in kept[:10]] == [f"# T\n\n{n}" for n in range(10)][:len(kept)] and len(kept) <= 12
    assert len(kept) == data.count(b"</article>") + data.count(b"</PubmedArticle>")


@pytest.mark.fault
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_loses_one_article(data):
    whole = [(ARTICLE % f"{n} <b>x</b>").encode() for n in range(5)]
    n = data.draw(st.integers(0, 4))
    start = data.draw(st.integers(0, len(whole[n]) - 1))
    end = data.draw(st.integers(start + 1, len(whole[n])))
    whole[n] = whole[n][:start] + data.draw(st.binary(max_size=5)) + whole[n][end:]
    kept = [d.text for d in articles(io.BytesIO(b"\n".join(whole))) if "dropped" not in d.metadata]
    assert sum(f"# T\n\n{k} x" in kept for k in range(5) if k != n) >= 3 + (n == 4 or b"</article>" in whole[n] or b"<article" not in whole[n])


def test_topic_filter(dev_data):
    medical_texts = [d.text for f in (dev_data / "medical" / "craft_txt").glob("*.txt") for d in documents(f)] + [
        d.text for f in (dev_data / "medical" / "jats").glob("*.nxml") for d in documents(f)]
    general = dev_data / "general"
    wiki = [x for x in re.split(r"\n = (?=[^=])", (general / "wikitext2" / "valid.txt").read_text()) if len(x) > 500]
    lines = lambda name: [json.loads(line)["text"] for line in (general / name).open()]
    sec = [" ".join(str(v) for v in json.loads(f.read_text()).values()) for f in (dev_data / "sec" / "items").glob("*.json")]
    passed = lambda texts: sum(map(on_topic, texts)) / len(texts)
    assert len(medical_texts) == 59 and passed(medical_texts) == 1 and min(map(topic, medical_texts)) > 0.09
    assert passed(wiki) == passed(lines("arxiv/arxiv.jsonl")) == passed(sec) == 0 and passed(lines("c4/c4_demo.jsonl")) < 0.08


def test_topic_of_clinical_and_other_words():
    assert on_topic("A 54-year-old woman presented with dyspnoea, chest pain and a rash; troponin was raised and an ECG showed ischaemia.")
    assert not on_topic("The board of directors declared a quarterly dividend and reported net revenue of several historic master trusts.")
    assert topic("") == 0 == topic("12 34") and not on_topic("")


def test_memory_stays_flat_and_it_is_fast(dev_data, tmp_path):
    one_lot = b"".join(f.read_bytes() for f in sorted((dev_data / "medical" / "jats").glob("*.nxml")))
    with (tmp_path / "all.xml").open("wb") as out:
        for _ in range(60_000_000 // len(one_lot)): out.write(one_lot)
    code = r"""
import re, sys, time
from domain_adapt.sources.medical import documents
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024
before, start, n = peak(), time.process_time(), 0
for doc in documents(sys.argv[1]): n += "dropped" not in doc.metadata
print(n, peak() - before, 60 / (time.process_time() - start))"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.xml")], capture_output=True, text=True, check=True)
    n, grown, speed = map(float, done.stdout.split())
    assert n == 10 * (60_000_000 // len(one_lot)) and grown < 150 and speed > 5, done.stdout
