"""Patents of five formats: every figure kept, fields checked by hand, parts read back, damage loses one patent."""
import io
import json
import re
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from domain_adapt.sources.markdown import fidelity, figures
from domain_adapt.sources.patents import PARTS, aps_patents, documents, part, xml_patents
from domain_adapt.sources.tagged import CHARACTERS
from growth import is_linear

# The printed patent, by a walk of its own over the raw file: no rule, table or splitter of the reader is used.
UNSEEN = {"img", "image", "emi", "number"}
INLINE = set("b i u o bold italic highlight hil figref fgref clref claim-ref cross-reference dependent-claim-reference ptext pdat stext "
             "in-line-formula smallcaps crossref patcit text othercit nplcit".split())


def visible(el) -> str:
    name = el.tag.lower()
    if name in UNSEEN: return ""
    inside_reference = name == "claim-text" and el.getparent().tag == "dependent-claim-reference"
    edge = "" if name in INLINE or inside_reference else " " if name in ("sup", "sub", "superscript", "subscript", "sp", "sb") else "\n"
    inner = (el.text or "") + "".join((visible(x) if isinstance(x.tag, str) else "") + (x.tail or "") for x in el)
    return edge + inner + edge


def printed_xml(raw: str) -> list[str]:
    "What each document of a file shows."
    out = []
    for piece in re.split(r"<\?xml [^>]*\?>", raw)[1:]:
        piece = re.sub(r"<!--.*?-->|<!DOCTYPE[^\[>]*(?:\[.*?\]\s*)?>", "", piece, count=2, flags=re.S).strip()
        piece = re.sub(r"&(?!amp;|lt;|gt;|quot;|apos;|#)([\w.]+);", lambda m: CHARACTERS[m[1]], piece)
        root = etree.fromstring(piece)
        titles = root.xpath("//us-bibliographic-data-grant/invention-title|//us-bibliographic-data-application/invention-title"
                            "|//title-of-invention|//SDOBI/B500/B540")
        parts = root.xpath("/*/abstract|/*/description|/*/claims|/*/subdoc-abstract|/*/subdoc-description|/*/subdoc-claims"
                           "|/*/SDOAB|/*/SDODE|/*/SDOCL")
        out.append("\n".join(map(visible, titles + parts)))
    return out


def printed_aps(raw: str) -> str:
    lines, section, out = raw.split("\n"), "", []
    for n, line in enumerate(lines):
        if re.fullmatch(r"[A-Z]{4}\s*", line): section = line.strip()
        elif line.startswith("TTL") and section == "PATN": out.append(line[4:])
        elif section in ("ABST", "GOVT", "PARN", "BSUM", "DRWD", "DETD", "CLMS", "DCLM") and not line.startswith(("NUM", "STM")):
            out.append("\n" + line[4:] if line.startswith("TBL") or line[:1] != " " else line)
    text = re.sub(r"##[A-Z]+\d+##", " ", "\n".join(out))
    return re.sub(r"\.(?:[a-z]{2,}|[A-Z]{2,})\.", " ", re.sub(r"\.(?:sub|sup)\.", " ", text))


def files(dev_data): return sorted(f for f in (dev_data / "patents").iterdir() if "docling_tables" not in f.name)


def test_no_figure_of_a_patent_is_lost_or_invented(dev_data):
    seen = 0
    for f in files(dev_data):
        raw = f.read_bytes().decode()
        shown = printed_xml(raw) if f.suffix == ".xml" else [printed_aps(raw)]
        found = list(documents(f))
        assert len(found) == len(shown), f.name
        for truth, doc in zip(shown, found):
            got = fidelity(truth, doc.text)
            assert (got.kept, got.invented) == (got.body, 0), (f.name, got, figures(truth) - figures(doc.text), figures(doc.text) - figures(truth))
            seen += got.body
    assert seen > 10_000


def by_hand(dev_data, name, at=0): return list(documents(dev_data / "patents" / name))[at]


@pytest.mark.parametrize("name, claims, abstract, want", [
    ("docling_ipg07997973.xml", 28, "Various embodiments of amusement devices and methods for various games are described.", dict(
        number="7997973", kind_code="B2", date="2011-08-16", filed="2009-07-30", application="12512730", assignee="CFPH, LLC",
        title="Amusement device for secondary games", patent_type="utility", classification="G06F 17/00",
        url="https://patents.google.com/patent/US7997973B2", inventors="Howard W. Lutnick; Dean P. Alderucci; Geoffrey M. Gelman")),
    ("gouspto_grant_v4-5-B1.xml", 20, "A method/system is provided for improving reverse hill climb performance of a hybrid vehicle.", dict(
        number="9358892", kind_code="B1", date="2016-06-07", classification="B60L 11/1809", inventors="Geoffrey D. Gaither")),
    ("gouspto_application_v4-5-A1.xml", 6, "Seed metering device applied to agricultural machines including two distal", dict(
        number="20220159901", kind_code="A1", date="2022-05-26", title="SEED DISTRIBUTOR USED FOR AGRICULTURAL MACHINES")),
    ("docling_ipgD0701016.xml", 1, "", dict(number="D701016", kind_code="S1", date="2014-03-18", patent_type="design",
        title="Cheese in form of a triangular pyramid", url="https://patents.google.com/patent/USD701016S1")),
    ("uspto_xmlApp2004_US20050004974A1.xml", 21, "The Device Model Agent (DMA), the device side technology module", dict(
        number="20050004974", date="2005-01-06", classification="G06F 15/16", title="Device model agent")),
    ("gouspto_grant_v2-5-B1.xml", 31, "A faucet support member for fixing a faucet in a mounting hole made in a base plate,", dict(
        number="6334226", kind_code="B1", date="2002-01-01", classification="E03C 1/04", title="Faucet support member", assignee="Toto Ltd.")),
    ("uspto_sgml_US06336130.xml", 22, "A communications systems, e.g., a telecommunications system, includes", dict(
        number="6336130", date="2002-01-01", inventors="Thanh Van Do", application="09413215", filed="1999-10-05")),
    ("uspto_sgml_USD435854S1.xml", 1, "", dict(number="D435854", kind_code="S", date="2001-01-02", patent_type="design", title="Disc cartridge")),
    ("uspto_pap_US20010000943A1.xml", 13, "An organic ELECTROLUMINESCENCE device exhibiting a minimal change in the color purity", dict(
        number="20010000943", kind_code="A1", date="2001-05-10", filed="2000-12-04", inventors="Kenichi Fukuoka; Mitsura Eida",
        assignee="IDEMITSU KOSAN CO., LTD.", classification="H01J 1/62")),
    ("gouspto_application_v1-5-A1_2.xml", 33, "Process and a device for detecting a change in the fiber orientation", dict(
        number="20010000002", date="2001-03-15")),
    ("uspto_greenbook_US03932709.greenbook", 17, "An electronic business telephone for the transmission and receipt of voice messages", dict(
        number="3932709", kind_code="A", date="1976-01-13", filed="1974-03-07", application="05449155", classification="H04M 11/00",
        title="Electronic business telephone", inventors="Don G. Hoff; Patrick Young", assignee="General Teletronics Incorporated")),
    ("docling_pftaps057006474.txt", 20, "To provide a reagent with excellent stability under storage, which can detect a subject", dict(
        number="5700647", date="1997-12-23", classification="C12Q 1/68", title="Carbocation containing cyanine-type dye"))])
def test_fields_checked_by_hand(dev_data, name, claims, abstract, want):
    doc = by_hand(dev_data, name)
    assert {k: doc.metadata[k] for k in want} == want
    assert all(isinstance(v, str) for v in doc.metadata.values())
    assert part(doc.text, doc.metadata, "abstract").startswith(abstract) and bool(part(doc.text, doc.metadata, "abstract")) == bool(abstract)
    said = part(doc.text, doc.metadata, "claims").split("\n\n")
    assert len(said) == claims and (claims == 1 or said[-1].startswith(f"{claims}. "))


def test_parts_read_back_exactly(dev_data):
    docs = [d for f in files(dev_data) for d in documents(f)]
    assert len(docs) == 22
    for doc in docs:
        head, *rest = re.split(r"\n\n## (Abstract|Description|Claims)\n\n", doc.text)
        assert head == f"# {doc.metadata['title']}"
        assert {k.lower(): v for k, v in zip(rest[::2], rest[1::2])} == {k: x for k in PARTS if (x := part(doc.text, doc.metadata, k))}
        assert part(doc.text, doc.metadata, "claims") and part(doc.text, doc.metadata, "nothing") == ""


def test_two_in_a_file(dev_data):
    first, second = documents(dev_data / "patents" / "gouspto_test.xml")
    assert (first.metadata["number"], second.metadata["number"]) == ("11147202", "11147203")
    fragment, = documents(dev_data / "patents" / "docling_tables_ipa20180000016.xml")
    assert fragment.metadata["filter_reason"] == "no patent in it"


def test_a_table_of_a_patent(dev_data):
    assert """| CIEx | 0.150 | 0.256 | 0.655 | 0.151 | 0.151 | 0.151 | 0.158 | 0.148 | 0.288 | 0.625 |""" in by_hand(
        dev_data, "uspto_pap_US20010000943A1.xml").text
    assert "| Example 1 | 60 | — | 31.5 | 74.9 | 12.6 | 2.4 | 6.0 | 35.4 | 430.8 |" in by_hand(dev_data, "docling_ipa20180000016.xml").text
    assert "2        828           863\n3        833           871" in by_hand(dev_data, "docling_pftaps057006474.txt").text


GRANT = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE us-patent-grant SYSTEM "x.dtd" [ ]>
<us-patent-grant><us-bibliographic-data-grant><publication-reference><document-id><country>US</country><doc-number>0800000%s</doc-number>
<kind>B2</kind><date>20110816</date></document-id></publication-reference><invention-title>Trap</invention-title></us-bibliographic-data-grant>
<abstract><p>Of %s.</p></abstract><description><heading>FIELD</heading><p>Text%s</p></description><claims><claim><claim-text>1. A trap:
<claim-text>with a spring; and</claim-text><claim-text>a door.</claim-text></claim-text></claim><claim><claim-text>2. The trap of
<claim-ref>claim 1</claim-ref>.</claim-text></claim></claims></us-patent-grant>
"""
SEQUENCE = '<?xml version="1.0"?>\n<!DOCTYPE sequence-cwu SYSTEM "s.dtd">\n<sequence-cwu id="S"><p>acgt 10</p></sequence-cwu>\n'
APS = """PATN
WKU  0400000%s
SRC  5
APN  4491556
APT  1
TTL  Trap
ISD  19760113
NCL  2
ABST
PAL  Of %s.
CLMS
NUM  1.
PAR  1. A trap:
PA1  with a door.
NUM  2.
PAR  2. The trap of claim 1.
"""


def read(data, reader=xml_patents): return list(reader(io.BytesIO(data.encode() if isinstance(data, str) else data)))


def test_a_week_of_many_kinds():
    week = GRANT % (1, 1, "") + SEQUENCE + GRANT % (2, 2, "<sequence-list>acgt</sequence-list>") + "<?xml version='1.0'?><other/>" + GRANT % (3, 3, " & 5 &alpha; &zork;")
    found = read(week)
    assert [d.metadata.get("filter_reason") or d.metadata["number"] for d in found] == ["8000001", "sequence listing", "8000002", "8000003"]
    assert found[1].metadata["dropped"] == "not text"
    assert found[3].text == ("# Trap\n\n## Abstract\n\nOf 3.\n\n## Description\n\n### FIELD\n\nText & 5 α &zork;\n\n## Claims\n\n"
                             "1. A trap:\nwith a spring; and\na door.\n\n2. The trap of claim 1.")


def test_damage_in_a_week_loses_one_patent():
    good, cut = GRANT % (1, 1, ""), (GRANT % (2, 2, ""))[:-60]
    assert [d.metadata.get("filter_reason", "kept") for d in read(good + cut + GRANT % (3, 3, ""))] == [
        "kept", "us-patent-grant: breaks off before </us-patent-grant>", "kept"]
    assert [d.metadata.get("dropped", "kept") for d in read(good + GRANT % (2, 2, " < 5") + good)] == ["kept", "unreadable", "kept"]
    nothing = GRANT.replace("<abstract>", "<x>").replace("</abstract>", "</x>").replace("description>", "x>").replace("claims>", "x>") % (1, 1, "")
    assert read(nothing)[0].metadata["filter_reason"] == "no text" and read("")[0].metadata["filter_reason"] == "no patent in it"
    assert "without its number" in read(GRANT.replace("0800000", "x") % ("", 1, ""))[0].metadata["filter_reason"]
    assert read("<PATDOC><SDOAB/></PATDOC>")[0].metadata["filter_reason"] == "a patent without its bibliographic data"


def test_sgml_with_unclosed_elements():
    sgml = ("<PATDOC DTD='2.4'><SDOBI><B100><B110><DNUM><PDAT>06000001</PDAT></DNUM></B110><B130><PDAT>E1</PDAT></B130></B100><B500><B560><B561><CITED-BY-OTHER>"
            "</B561></B560></B500></SDOBI><SDOAB><PARA LVL=7><PTEXT><PDAT>R&D &ge; 5 &mgr;m &ohgr;</PDAT></PTEXT></PARA></SDOAB><SDODR><EMI FILE=a.tif></SDODR></PATDOC>")
    doc, = read(sgml)
    assert part(doc.text, doc.metadata, "abstract") == "R&D ≥ 5 μm ω" and doc.metadata["patent_type"] == "reissue"


def test_an_entity_bomb_does_not_go_off():
    bomb = "<!DOCTYPE us-patent-grant [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
        f"<!ENTITY a{n} '{'&a%s;' % (n - 1 or '')*10}'>" for n in range(1, 12)) + "<!ENTITY f SYSTEM 'file:///etc/hostname'>]>"
    doc, = read(bomb + (GRANT % (1, 1, " &a11; &f;")).split("]>")[1])
    assert "Text &a11; &f;" in doc.text


def test_windows_characters_and_packed_files(tmp_path):
    with zipfile.ZipFile(path := tmp_path / "ipg110816.zip", "w") as z:
        z.writestr("ipg110816.xml", (GRANT % (1, 1, " caf\xe9 \x93q\x94")).encode("latin-1"))
        z.writestr("US08000001-D00001.TIF", b"II*\0")
        z.writestr("old.txt", "HHHHHT  APS1  ISSUE\n" + APS % ("07", 7) + APS % ("15", 8))
        z.writestr("empty.sgm", "")
    found = list(documents(path))
    assert [d.metadata.get("filter_reason") or d.metadata["number"] for d in found] == [
        "8000001", "unknown kind of file .TIF", "4000000", "4000001", "no patent in it"]
    assert "café “q”" in found[0].text


def test_the_green_book():
    first, second = read(APS % ("07", "10.sup.-3 .mu.m") + APS % ("15", 2), aps_patents)
    assert first.text == "# Trap\n\n## Abstract\n\nOf 10^-3 μm.\n\n## Claims\n\n1. A trap:\nwith a door.\n\n2. The trap of claim 1."
    assert first.metadata["application"] == "05449155" and second.metadata["number"] == "4000001"
    design = "PATN\nWKU  D02420583\nAPT  4\nTTL  Chair\nISD  19770104\nDCLM\nPAR  The ornamental design for a chair, as shown.\n"
    doc, = read(design, aps_patents)
    assert (doc.metadata["number"], doc.metadata["kind_code"], doc.metadata["patent_type"]) == ("D242058", "S", "design")
    assert part(doc.text, doc.metadata, "claims") == "The ornamental design for a chair, as shown."
    assert read("ABST\nPAL  x\n", aps_patents)[0].metadata["filter_reason"] == "no patent in it"
    assert read("PATN\nABST\nPAL  x\n", aps_patents)[0].metadata["filter_reason"] == "a patent without its number"


@pytest.mark.fault
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.booleans())
def test_a_file_that_breaks_off_keeps_what_came_before(at, old):
    pages = [(APS % (f"{n}9", n) if old else GRANT % (n, n, "")).encode() for n in range(5)]
    whole = b"".join(pages)
    data = whole[:at % len(whole)]
    found = read(data, aps_patents if old else xml_patents)
    kept = [d.metadata["number"] for d in found if "dropped" not in d.metadata]
    ends = [len(b"".join(pages[:n + 1])) for n in range(5)]
    assert kept[:sum(e <= len(data) for e in ends)] == [f"{4 if old else 8}00000{n}" for n in range(5)][:sum(e <= len(data) for e in ends)]
    assert len(found) - len(kept) <= 1


@pytest.mark.fault
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["", "PATN\n", "<PATDOC>", "<us-patent-grant>", "PATN\nWKU  039327094\nCLMS\n"]), st.booleans())
def test_any_bytes_leave_a_record_each(data, start, old):
    assert read(start.encode() + data + b"\n</PATDOC></us-patent-grant>", aps_patents if old else xml_patents)


def test_no_input_of_the_green_book_takes_quadratic_time():
    for piece in ("PAR  x\n", "      x.sub.1\n", ".sub.", "NUM  1.\nPAR  1. x\n", "TBL  1 ____\n     2\n", "##STR1##", "PATN\nWKU  040000007\n", " ", "\n", "DETD\n"):
        assert is_linear(lambda size: read("PATN\nWKU  040000007\nDETD\nPAR  x\n" + piece * (size // len(piece)), aps_patents), 100_000), piece


@pytest.mark.parametrize("name", ["docling_ipg07997973.xml", "uspto_greenbook_US03932709.greenbook"])
def test_memory_stays_flat_and_it_is_fast(dev_data, tmp_path, name):
    one = (dev_data / "patents" / name).read_bytes()
    path = tmp_path / f"all{name[name.rindex('.'):]}"
    with path.open("wb") as out:
        for _ in range(55_000_000 // len(one)): out.write(one)
    code = r"""
import re, sys, time
from domain_adapt.sources.patents import documents
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024
before, start, n = peak(), time.process_time(), 0
for doc in documents(sys.argv[1]): n += "dropped" not in doc.metadata
print(n, peak() - before, 55 / (time.process_time() - start))"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    n, grown, speed = map(float, done.stdout.split())
    assert n == 55_000_000 // len(one) and grown < 150 and speed > 5, done.stdout
