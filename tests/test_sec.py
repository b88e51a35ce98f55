"""Filings: what each says of itself, however it is wrapped."""
import gzip
import json

import pytest
from hypothesis import given, settings, strategies as st

from domain_adapt import assets
from domain_adapt.sources.markdown import figures
from domain_adapt.sources.reading import DAMAGE, Unreadable
from domain_adapt.sources.sec import documents, kind

HEADER = """<SEC-DOCUMENT>0000000042-97-000006.txt : 19970128
<SEC-HEADER>0000000042-97-000006.hdr.sgml : 19970128
ACCESSION NUMBER:\t\t0000000042-97-000006
CONFORMED SUBMISSION TYPE:\t8-K
CONFORMED PERIOD OF REPORT:\t19961231
FILED AS OF DATE:\t\t19970127

FILER:

\tCOMPANY DATA:\t
\t\tCOMPANY CONFORMED NAME:\t\t\tWIDGETS INC
\t\tCENTRAL INDEX KEY:\t\t\t0000000042
\t\tSTANDARD INDUSTRIAL CLASSIFICATION:\tRETAIL-VARIETY STORES [5331]
</SEC-HEADER>
"""
ABOUT = dict(date="1996-12-31", url="https://www.sec.gov/Archives/edgar/data/42/000000004297000006", cik="42",
    company="WIDGETS INC",
             form="8-K", filed="1997-01-27", period="1996-12-31", sic="5331", accession="0000000042-97-000006")
PICTURE = "begin 644 logo.jpg\nM" + "A" * 60 + "\n#_]C_\n`\nend\n"


def doc(text, type="8-K", file="", description=""):
    "One document of a submission."
    head = "".join(f"<{tag}>{said}\n" for tag, said in (("TYPE", type), ("SEQUENCE", "1"), ("FILENAME", file),
        ("DESCRIPTION", description)) if said)
    return f"<DOCUMENT>\n{head}<TEXT>\n{text}\n</TEXT>\n</DOCUMENT>\n"


def read(tmp_path, name, data):
    "The documents of a file with `data`."
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(documents(tmp_path / name))


def why(doc): return doc.metadata.get("dropped"), doc.metadata.get("filter_reason")


@pytest.mark.parametrize("head", ["<DOCUMENT>\n<TYPE>10-K405\n<SEQUENCE>1\n<TEXT>\n",
    "<DOCUMENT><TYPE>10-K405<TEXT>"])
def test_an_envelope_names_the_form_and_leaves_no_text(tmp_path, head):
    for name in ("a.htm", "a.txt"):
        found, = read(tmp_path, name, f"{head}<html><body><p>Words 5</p></body></html>\n</TEXT>\n</DOCUMENT>")
        assert found.text == "Words 5" and found.metadata["form"] == found.metadata["document_type"] == "10-K405"


def test_metadata_of_a_page(tmp_path):
    dei = dict(DocumentType="10-K", EntityRegistrantName="Acme &amp; Co.", EntityCentralIndexKey="0000000042",
               DocumentPeriodEndDate="September\u00a027, 2025")
    facts = "".join(f'<p>A<ix:nonNumeric name="dei:{k}">{v}</ix:nonNumeric></p>' for k, v in dei.items())
    found, = read(tmp_path, "acme_000000004225000001.html", f"<html>{facts}<p>5 €</p></html>".encode("cp1252"))
    assert found.text.endswith("5 €") and found.metadata == dict(
        title="Acme & Co. 10-K 2025-09-27", date="2025-09-27", cik="42", company="Acme & Co.", form="10-K",
            filed="",
        url="https://www.sec.gov/Archives/edgar/data/42/000000004225000001", period="2025-09-27", sic="",
        accession="0000000042-25-000001", document_type="10-K")
    assert read(tmp_path, "old.htm", "<p>Annual report on FORM 10-K</p>")[0].metadata["form"] == "10-K"
    assert read(tmp_path, "old.txt", "Annual report on Form 10-Q\n\nItem 1. Sales")[0].metadata["form"] == "10-Q"
    assert why(*read(tmp_path, "x.jpg", b"")) == ("not text", "unknown kind of file .jpg")


def test_metadata_of_a_submission(tmp_path):
    first, second, third = read(tmp_path, "a.txt", HEADER + doc("Words", file="a.txt") + doc("News",
        "EX-99.1", "b.txt", "PRESS RELEASE") + doc("x", "")
                                + "</SEC-DOCUMENT>\n")
    assert first.metadata == dict(title="WIDGETS INC 8-K 1996-12-31", **ABOUT, document_type="8-K", file="a.txt")
    assert second.metadata == dict(title="WIDGETS INC 8-K EX-99.1 1996-12-31", **ABOUT,
        document_type="EX-99.1", file="b.txt", description="PRESS RELEASE")
    assert third.metadata == dict(title="WIDGETS INC 8-K 1996-12-31", **ABOUT, document_type="8-K")
    assert [d.text for d in (first, second, third)] == ["Words", "News", "x"]


def test_the_header_is_believed_before_the_page_and_the_page_where_it_is_silent(tmp_path):
    page = '<html><ix:nonNumeric name="dei:EntityRegistrantName">Gadgets</ix:nonNumeric><ix:nonNumeric name="dei:EntityCentralIndexKey">7</ix:nonNumeric></html>'
    assert read(tmp_path, "a.txt", HEADER + doc(page))[0].metadata["company"] == "WIDGETS INC"
    found = read(tmp_path, "0000000042-97-000006.txt", doc(page, "10-K") + doc("x", "EX-21"))
    assert found[0].metadata["company"] == "Gadgets" and found[0].metadata["url"].endswith("/7/000000004297000006")
    assert [(d.metadata["form"], d.metadata["document_type"]) for d in found] == [("10-K", "10-K"),
        ("10-K", "EX-21")]


@pytest.mark.parametrize("text, type, file, reason", [
    (PICTURE, "GRAPHIC", "logo.jpg", "picture"), (PICTURE, "GRAPHIC", "", "picture"),
        (PICTURE, "EX-99", "", "picture"),
    (f"<PDF>\n{PICTURE.replace('jpg', 'pdf')}</PDF>", "10-K", "a.pdf", "PDF"),
    (PICTURE.replace(".jpg", ""), "10-K", "", "uuencoded file"),
    (PICTURE.replace("jpg", "xlsx"), "EXCEL", "Financial_Report.xlsx", "Excel"),
    (PICTURE.replace("jpg", "zip"), "ZIP", "a.zip", "ZIP"),
    ("%PDF-1.4 5", "EX-99", "", "PDF"), ("GIF89a", "EX-99", "", "picture"),
    ("<html><body>R1</body></html>", "XML", "R1.htm", "XBRL"),
    ("<XML>\n<?xml version='1.0'?>\n<xbrli:xbrl xmlns:xbrli='x'/></XML>", "EX-101.INS", "a.xml", "XBRL"),
    ("<XBRL>\n<?xml version='1.0'?>\n<!--b-->\n<schema/>", "EX-100.SCH", "a.xsd", "XBRL"),
    ("<XML>\n<FilingSummary/>", "XML", "FilingSummary.xml", "XBRL"), ("{}", "JSON", "MetaLinks.json", "JSON"),
    ("var x", "XML", "Show.js", "script"), ("a {}", "XML", "report.css", "style sheet")])
def test_what_is_no_text_is_named_and_not_stored(tmp_path, text, type, file, reason):
    found, after = read(tmp_path, "a.txt", HEADER + doc(text, type, file) + doc("after"))
    assert why(found) == ("not text", reason) and found.text == "" and after.text == "after"
    assert found.metadata["document_type"] == type and found.metadata["cik"] == "42"


@pytest.mark.parametrize("text, markdown", [
    ("<XBRL>\n<?xml version='1.0' encoding='ASCII'?>\n<html><body><p>Sales 5</p></body></html>\n</XBRL>",
        "Sales 5"), ("<XML>\n<HTML><BODY>Sales 5</BODY></HTML>\n</XML>", "Sales 5"),
    ("<DIV>Sales 5</DIV>", "Sales 5"), ("<p>Sales 5</p>", "Sales 5"),
    (f"We show:\n{PICTURE}and <b>go</b> on.", "We show:\n\nand <b>go</b> on."),
    (f"<html><p>We show:</p>\n{PICTURE}</html>", "We show:"),
    ("<PAGE>\n<TABLE>\n<S>  <C>\nSales   5\n</TABLE>", "```\nSales   5\n```"),
    ("<TABLE>\n<TR>\n<TD>5</TD><TD>6</TD></TR></TABLE>\n<p>", "5 6"),
    ("an inner </TEXT> tag", "an inner tag"), ("caf\xe9 \x93q\x94", "café “q”"),
    ("<XML>\n<?xml version='1.0'?>\n<edgarSubmission><amount>5</amount></edgarSubmission>\n</XML>",
    "# Edgar submission\n\nAmount: 5")])
def test_texts_of_every_kind(tmp_path, text, markdown):
    data = (HEADER + doc(text) + doc("caf\u00e9")).encode("latin-1").replace(b"caf\xe9\n</TEXT>",
        "café\n</TEXT>".encode())
    first, second = read(tmp_path, "a.nc", data)
    assert first.text == markdown and second.text == "café"
    assert first.metadata.get("embedded") == ("logo.jpg" if "begin" in text else None)


def test_damage_leaves_a_reason_and_what_is_whole_is_read(tmp_path):
    broken = doc("<XML><ownershipDocument><a></XML>", "4") + doc("", "EX-1") + doc("\x00\x01" * 50,
        "EX-2") + doc("whole", "EX-3")
    found = read(tmp_path, "a.txt", HEADER + broken + "words\n" + doc("too")[:-30])
    assert [d.text for d in found] == ["", "", "", "whole", "words", ""]
    assert [why(d)[0] for d in found] == ["unreadable"] * 3 + [None] + ["unreadable"] * 2
    assert [why(d)[1] for d in found][1:] == ["no text", "binary data", None, "words outside of any document",
        "document breaks off"]
    assert why(found[0])[1].startswith("not XML")


@pytest.mark.parametrize("name, data, reason", [
    ("a.txt", b"", "empty file"), ("a.htm", b" \n", "empty file"),
        ("a.txt", bytes(range(256)) * 9, "binary data"), ("a.txt", HEADER.encode(),
        "submission without documents"),
    ("a.htm", b"<html></html>", "no text"), ("a.xml", b"<a>", "not XML")])
def test_files_that_hold_nothing_to_read(tmp_path, name, data, reason):
    found, = read(tmp_path, name, data)
    assert why(found)[0] == "unreadable" and why(found)[1].startswith(reason)


@pytest.mark.parametrize("name, data, reason", [("a.json", b"{", "broken JSON"), ("a.json", b"[" * 100_000,
    "broken JSON"), ("a.json", b"[]", "without items"), ("a.json", b'{"item_1": 5}', "without items")])
def test_damaged_items_are_unreadable(tmp_path, name, data, reason):
    with pytest.raises(Unreadable, match=reason): read(tmp_path, name, data)


def test_items_are_one_document_under_their_headings(tmp_path):
    found, = read(tmp_path, "a.json", json.dumps(dict(
        cik="0000000042", company="WIDGETS INC", filing_type="10-K", filing_date="1997-01-27",
            period_of_report="1996-12-31", sic="5331", htm_filing_link=None,
        filename="42_10K_1997_0000000042-97-000006.txt", item_1="Item 1.\nBusiness\nWe sell.\n\nWe buy.",
        item_1A="", item_1B="ITEM 1B. UNRESOLVED\n- ------------\nNone.",
        item_2=" ", item_3="A plant of 5 acres.", item_4="Item 4.\nReserved.", item_7A="----")))
    assert found.text == ("## Item 1. Business\n\nWe sell.\n\nWe buy.\n\n## ITEM 1B. UNRESOLVED\n\nNone.\n\n## Item 3\n\nA plant of 5 acres.\n\n## Item 4.\n\nReserved.")
    assert found.metadata == dict(title="WIDGETS INC 10-K 1996-12-31", **ABOUT | dict(form="10-K"),
        document_type="10-K", file="42_10K_1997_0000000042-97-000006.txt")


pages = {"html": "<html><body><p>{}</p></body></html>", "text": "{}", "xbrl": "<XBRL>\n<html>{}</html>\n</XBRL>"}
words = st.text("abcdefgh", min_size=3, max_size=20)


@given(st.lists(st.tuples(st.sampled_from([*pages, "picture"]), words), min_size=1, max_size=5),
    st.booleans(), st.data())
@settings(deadline=None, max_examples=40)
def test_every_document_gives_one_record_wherever_the_file_breaks_off(tmp_path_factory, docs, packed, data):
    text = HEADER + "".join(doc(PICTURE, "GRAPHIC",
        "logo.jpg") if how == "picture" else doc(pages[how].format(said)) for how, said in docs)
    folder, wanted = tmp_path_factory.mktemp("cut"), ["" if how == "picture" else said for how, said in docs]
    assert [d.text for d in read(folder, "a.txt", text)] == wanted
    raw = gzip.compress(text.encode()) if packed else text.encode()
    cut = raw[:data.draw(st.integers(0, len(raw)))]
    try: found = read(folder, "a.txt.gz" if packed else "a.txt", cut)
    except (Unreadable, *DAMAGE):
        assert packed and cut != raw
        return
    ended = len(docs) if cut == raw else cut.decode().count("</DOCUMENT>")
    kept = [d.text for d in found]
    assert kept[:ended] == wanted[:ended] and ended <= len(kept) <= max(ended + 1, 1)


SUBMISSIONS = {   # read off the raw files by eye: form, company, cik, period, filed, sic, the types of its documents
    "1000685_8K_1997_0001000685-97-000006.txt": ("8-K", "HOME HEALTH CORP OF AMERICA INC \\PA\\", "1000685",
        "1997-01-10", "1997-01-27", "8082", ["8-K"]),
    "1000695_8K_2001_0000950117-01-501228.txt": ("8-K", "ENTRADA NETWORKS INC", "1000695", "2001-09-20",
    "2001-09-20", "3577", ["8-K"]),
    "1001136_8K_2000_0000950124-00-003635.txt": ("8-K", "STOCKWALK COM GROUP INC", "1001136", "2000-06-06",
    "2000-06-07", "5122", ["8-K", "EX-99.1"]),
    "1002022_8K_2000_0000914260-00-000030.txt": ("8-K", "INNOVATIVE CLINICAL SOLUTIONS LTD", "1002022",
    "2000-05-23", "2000-05-23", "8090", ["8-K", "EX-10", "EX-10.2", "EX-99"]),
    "100240_8K_1994_0000950144-94-000103.txt": ("8-K", "TURNER BROADCASTING SYSTEM INC", "100240",
    "1994-01-24", "1994-01-24", "4833",
                                                ["8-K", "EX-12.(C)", "EX-12.(D)", "EX-23.(D)", "EX-23.(E)",
                                                "EX-99.(A)", "EX-99.(B)"]),
    "104169_8K_1995_0000899243-95-000310.txt": ("8-K", "WAL MART STORES INC", "104169", "1995-05-10",
    "1995-05-19", "5331", ["8-K", "EX-99"]),
    "edgartools_0000899681-95-000096.txt": ("S-3/A", "", "", "", "", "", ["S-3/A", "EX-99"]),
    "edgartools_0000943374-24-000509.txt": ("8-K", "1895 Bancorp of Wisconsin, Inc. /MD/", "1847360",
    "2024-12-20", "2024-12-27", "6036",
                                            ["8-K", "EX-101.SCH", "EX-101.LAB", "EX-101.PRE", "XML", "EXCEL",
                                            "XML", "XML", "XML", "JSON", "ZIP", "XML"]),
    "edgartools_0000950129-95-001652.txt": ("24F-2NT", "COMMON SENSE TRUST", "810271", "1995-10-31",
    "1995-12-28", "", ["24F-2NT", "EX-99.11"]),
    "edgartools_0001011438-98-000429.txt": ("8-K", "AAMES CAPITAL CORP", "913951", "1998-12-15", "1998-12-31",
    "6189", ["8-K", "EX-20.1"]),
    "edgartools_0001094891-00-000193.txt": ("4", "PRODUCTIVITY TECHNOLOGIES CORP /", "911787", "2000-02-29",
    "2000-03-14", "3540", ["4"]),
    "edgartools_0001127602-25-001055.txt": ("4", "AAR CORP", "1750", "2025-01-10", "2025-01-10", "3720",
    ["4", "EX-24"]),
    "edgartools_0001127602-25-004598.nc": ("4", "ARROW ELECTRONICS, INC.", "7536", "2025-02-12", "2025-02-13",
    "5065", ["4"]),
    "edgartools_0001193125-10-145855.nc": ("424B5", "CARMAX AUTO FUNDING LLC", "1259380", "", "2010-06-24",
    "6189", ["424B5"] + ["GRAPHIC"] * 4),
    "edgartools_0001398344-24-000491.nc": ("D/A", "INVESTURE OPPORTUNITY FUND, LP", "1296490", "",
    "2024-01-11", "", ["D/A"]),
    "edgartools_0001564590-20-004475-minimal.txt": ("10-K", "Tesla, Inc.", "1318605", "2019-12-31",
    "2020-02-13", "3711", ["10-K", "EX-21.1"])}


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_real_submissions(dev_data, name):
    form, company, cik, period, filed, sic, types = SUBMISSIONS[name]
    found = list(documents(dev_data / "sec" / "submissions" / name))
    assert [d.metadata["document_type"] for d in found] == types
    for d in found:
        assert {k: d.metadata[k] for k in ("form", "company", "cik", "period", "filed",
            "sic")} == dict(form=form, company=company, cik=cik, period=period, filed=filed, sic=sic)
        assert bool(d.text) != ("dropped" in d.metadata) and not set(map(type, d.metadata.values())) - {str}


def test_real_items_lose_no_figure(dev_data):
    for path in sorted((dev_data / "sec" / "items").glob("*.json")):
        found, = documents(path)
        given = json.loads(path.read_text())
        assert figures(found.text) == figures("\n".join(v for k,
            v in given.items() if k.startswith("item_"))), path.name
        assert found.metadata["filed"] == given["filing_date"] and found.metadata["accession"] in path.name


@pytest.mark.parametrize("name", ["aapl_2025_10k", "amzn_2026_10k", "tgt_2026_10k"])
def test_the_quickstart_filings_say_what_they_are(name):
    archive = assets.cache_folder() / "downloads" / assets.ASSETS["filings-10k"].file
    if not archive.is_file(): pytest.skip(f"{archive} is not there")
    found, = documents(assets.resolve("package:filings-10k") / f"{name}.html")
    assert found.metadata["form"] == "10-K" and found.metadata["cik"] and found.metadata["period"]


@pytest.mark.fault
@pytest.mark.parametrize("piece", [b"</p", b"<?xml", b" ", b"<!", b"<XML>", b"begin 644 a\n", b"<a:", b"\x00",
    b"</p>", b"<p"])
def test_the_kind_of_hostile_bytes_is_found_at_once(piece):
    for start in (b"", b"<?xml ?>", b"begin 644 x\n"): kind("a.xml", "",
        start + piece * (10_000_000 // len(piece)))
