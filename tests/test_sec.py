"""Filings: what each says of itself, however it is wrapped."""
import pytest

from domain_adapt import assets
from domain_adapt.sources.reading import Unreadable
from domain_adapt.sources.sec import documents


@pytest.mark.parametrize("head", ["<DOCUMENT>\n<TYPE>10-K405\n<SEQUENCE>1\n<TEXT>\n",
    "<DOCUMENT><TYPE>10-K405<TEXT>"])
def test_an_envelope_names_the_form_and_leaves_no_text(tmp_path, head):
    (tmp_path / "a.htm").write_text(f"{head}<html><body><p>Words 5</p></body></html>\n</TEXT>\n</DOCUMENT>")
    doc, = documents(tmp_path / "a.htm")
    assert doc.text == "Words 5" and doc.metadata["form"] == doc.metadata["document_type"] == "10-K405"


def test_metadata(tmp_path):
    dei = dict(DocumentType="10-K", EntityRegistrantName="Acme &amp; Co.", EntityCentralIndexKey="0000000042",
               DocumentPeriodEndDate="September\u00a027, 2025")
    facts = "".join(f'<p>A<ix:nonNumeric name="dei:{k}">{v}</ix:nonNumeric></p>' for k, v in dei.items())
    path = tmp_path / "acme_000000004225000001.html"
    path.write_bytes(f"<html>{facts}<p>5 €</p></html>".encode("cp1252"))
    doc, = documents(path)
    assert doc.text.endswith("5 €") and doc.metadata == dict(
        title="Acme & Co. 10-K 2025-09-27", date="2025-09-27", cik="42", company="Acme & Co.", form="10-K",
            filed="",
        url="https://www.sec.gov/Archives/edgar/data/42/000000004225000001", period="2025-09-27", sic="",
        accession="0000000042-25-000001", document_type="10-K")
    (tmp_path / "old.htm").write_text("<p>Annual report on FORM 10-K</p>")
    assert next(documents(tmp_path / "old.htm")).metadata["form"] == "10-K"
    (tmp_path / "x.jpg").touch()
    assert next(documents(tmp_path / "x.jpg")).metadata["dropped"] == "not text"


@pytest.mark.parametrize("name", ["aapl_2025_10k", "amzn_2026_10k", "tgt_2026_10k"])
def test_the_quickstart_filings_say_what_they_are(name):
    archive = assets.cache_folder() / "downloads" / assets.ASSETS["filings-10k"].file
    if not archive.is_file(): pytest.skip(f"{archive} is not there")
    doc, = documents(assets.resolve("package:filings-10k") / f"{name}.html")
    assert doc.metadata["form"] == "10-K" and doc.metadata["cik"] and doc.metadata["period"]


def test_full_submissions_are_refused_with_a_reason(dev_data):
    for path in sorted((dev_data / "sec" / "submissions").glob("*.txt")):
        with pytest.raises(Unreadable, match="full submission"): list(documents(path))
