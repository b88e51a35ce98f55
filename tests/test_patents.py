"""Patents of five formats: every figure kept, fields checked by hand, parts read back, damage loses one patent."""
import io
import json
import re
import time
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from domain_adapt.sources import patents, tagged
from domain_adapt.sources.markdown import fidelity, figures
from domain_adapt.sources.patents import PARTS, aps_patents, documents, part, xml_patents
from domain_adapt.sources.reading import DAMAGE, Unreadable
from domain_adapt.sources.tagged import CHARACTERS

# The printed patent, by a walk of its own over the raw file: no rule, table or splitter of the reader is used.
UNSEEN = {"img", "image", "emi", "number", "table-cwu/number"}
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
