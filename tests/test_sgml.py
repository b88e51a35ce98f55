"""Submissions: every document comes back in order with its text, however it is wrapped and wherever it breaks off."""
import binascii
import random

import pytest
from hypothesis import example, given, settings, strategies as st

from domain_adapt.sources.sgml import Part, cut_uuencoded, is_submission, read_header, submission
from growth import is_linear, seconds

COLONS = """ACCESSION NUMBER:\t\t0000000042-97-000006
CONFORMED SUBMISSION TYPE:\t10-K405
CONFORMED PERIOD OF REPORT:\t19961231
FILED AS OF DATE:\t\t19970127

FILER:

\tCOMPANY DATA:\t
\t\tCOMPANY CONFORMED NAME:\t\t\tWIDGETS & CO /DE/
\t\tCENTRAL INDEX KEY:\t\t\t0000000042
\t\tSTANDARD INDUSTRIAL CLASSIFICATION:\tSERVICES-HOME HEALTH CARE SERVICES [8082]

\tFILING VALUES:
\t\tFORM TYPE:\t\t10-K405

\tFORMER COMPANY:
\t\tFORMER CONFORMED NAME:\tGADGETS INC
"""
TAGS = """<ACCESSION-NUMBER>0000000042-97-000006
<TYPE>10-K405
<PERIOD>19961231
<FILING-DATE>19970127
<FILER>
<COMPANY-DATA>
<CONFORMED-NAME>WIDGETS & CO /DE/
<CIK>0000000042
<ASSIGNED-SIC>8082
</COMPANY-DATA>
<FORMER-COMPANY>
<FORMER-CONFORMED-NAME>GADGETS INC
</FORMER-COMPANY>
</FILER>
"""
HEADER = dict(accession="0000000042-97-000006", form="10-K405", period="1996-12-31", filed="1997-01-27",
              company="WIDGETS & CO /DE/", cik="42", sic="8082")
PEM = "-----BEGIN PRIVACY-ENHANCED MESSAGE-----\nProc-Type: 2001,MIC-CLEAR\nOriginator-Name: webmaster@www.sec.gov\n\n{}" \
      "-----END PRIVACY-ENHANCED MESSAGE-----\n"
SEC = f"<SEC-DOCUMENT>0000000042-97-000006.txt : 19970128\n<SEC-HEADER>x.hdr.sgml : 19970128\n{COLONS}</SEC-HEADER>\n{{}}</SEC-DOCUMENT>\n"
WRAPPED = {"sec": SEC, "pem": PEM.format(SEC), "ims": PEM.format(SEC.replace("SEC-", "IMS-")),
           "tags": f"<SUBMISSION>\n{TAGS}{{}}</SUBMISSION>\n",
           "one line": f"<SUBMISSION>{TAGS}{{}}</SUBMISSION>".replace("\n", ""),
           "returns": f"<SUBMISSION>\n{TAGS.replace(chr(10), chr(13))}{{}}</SUBMISSION>\r"}
TAGGED = {"plain": "<DOCUMENT>\n<TYPE>{0}\n<SEQUENCE>1\n<FILENAME>a.txt\n<DESCRIPTION>It & more\n<TEXT>\n{1}\n</TEXT>\n</DOCUMENT>\n",
          "one line": "<DOCUMENT><TYPE>{0}<TEXT>{1}</TEXT></DOCUMENT>",
          "lower case": "<document>\n<type>{0}\n<text>\n{1}\n</text>\n</document>\n",
          "unclosed": "<DOCUMENT>\n<TYPE>{0}\n<TEXT>\n{1}\n</TEXT>\n",
          "no end": "<DOCUMENT>\n<TYPE>{0}\n<TEXT>\n{1}\n</DOCUMENT>\n",
          "spaced": "\n\n <DOCUMENT>\r\n\r\n<TYPE> {0} \r\n<TEXT>\r\n{1}\r\n</TEXT>\r\n</DOCUMENT>\r\n"}


def found(data):
    "Types and texts of the documents in a submission."
    return [(p.head.get("type"), p.body().decode().strip()) if isinstance(p, Part) else p for _,
        p in submission(data)]


@pytest.mark.parametrize("text", [COLONS, TAGS, TAGS.replace("\n", ""), COLONS.replace("[8082]", "[8082"),
    TAGS.replace("\n", "\r\n")])
def test_both_kinds_of_header_say_the_same(text): assert read_header(text) == HEADER


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_headers_are_read_through_every_wrapping(wrapped):
    (header, _), = submission(WRAPPED[wrapped].format("<DOCUMENT>\n<TYPE>8-K\n<TEXT>\na\n</TEXT>\n</DOCUMENT>\n").encode())
    assert header == HEADER


def test_the_company_is_the_issuer_or_subject_not_who_reports():
    party = "\t\tCOMPANY CONFORMED NAME:\t{}\n\t\tCENTRAL INDEX KEY:\t000000000{}\n"
    head = lambda *roles: "".join(f"{role}:\n\n\tCOMPANY DATA:\n" + party.format(role, i + 1) for i,
        role in enumerate(roles))
    cik = lambda *roles: read_header(head(*roles))["cik"]
    assert cik("REPORTING-OWNER", "ISSUER") == cik("FILED BY", "SUBJECT COMPANY") == "2"
    assert cik("FILER", "FILER") == cik("ISSUER", "REPORTING-OWNER") == cik("REPORTING-OWNER") == "1"
    old = head("SUBJECT COMPANY") + "<REPORTING-OWNER>\nCOMPANY DATA:\n" + party.format("DOE",
        9) + "</REPORTING-OWNER>\n"
    assert read_header(old)["cik"] == "1"


def test_a_header_without_sense_says_nothing():
    assert read_header("") == read_header("FILED AS OF DATE:\tsoon\nCENTRAL INDEX KEY:\tnone\n") == {}
    assert read_header("FILER:\nSTANDARD INDUSTRIAL CLASSIFICATION:\t []\n") == {}
    assert "sic" not in read_header("<FILER><CIK>0000000042<ASSIGNED-SIC>")


words = st.text(st.characters(codec="ascii", exclude_characters="<>\x00\r"),
    min_size=1).map(str.strip).filter(bool)
documents = st.lists(st.tuples(st.sampled_from(sorted(TAGGED)), st.sampled_from(["8-K", "EX-99.1", "10-K/A"]),
    words), min_size=1, max_size=6)


@given(documents, st.sampled_from(sorted(WRAPPED)))
@example([("unclosed", "8-K", "an inner </TEXT> tag"), ("plain", "EX-1", "<table> of </text> tags")], "pem")
@settings(deadline=None)
def test_any_documents_come_back_in_order_in_any_dialect(docs, wrapped):
    data = WRAPPED[wrapped].format("".join(TAGGED[how].format(kind, text) for how, kind, text in docs)).encode()
    assert is_submission(data) and found(data) == [(kind, text) for _, kind, text in docs]
    assert all(p.whole for _, p in submission(data))


@given(documents, st.sampled_from(sorted(WRAPPED)), st.data())
@settings(deadline=None, max_examples=400)
def test_a_truncated_file_loses_no_document_before_the_cut(docs, wrapped, data):
    whole, ends = "", []
    for how, kind, text in docs:
        whole += TAGGED[how].format(kind, text)
        ends.append(whole)
    full = WRAPPED[wrapped].format(whole).encode()
    start = WRAPPED[wrapped].index("{}")
    cut = data.draw(st.integers(0, len(full)))
    left = found(full[:cut])
    complete = [(kind, text) for (_, kind, text), end in zip(docs, ends) if start + len(end.rstrip()) <= cut]
    assert left[:len(complete)] == complete and len(left) <= len(complete) + 1


def test_what_breaks_off_says_so_and_a_finished_page_does_not():
    cut = lambda text: [p.whole for _, p in submission(text)]
    assert cut(b"<DOCUMENT><TYPE>8-K<TEXT>a</TEXT></DOCUMENT><DOCUMENT><TYPE>EX-1<TEXT>b") == [True, False]
    assert cut(b"<DOCUMENT><TYPE>8-K<TEXT>a<DOCUMENT><TYPE>EX-1<TEXT><html>b</html>\n") == [True, True]
    assert cut(b"<DOCUMENT><TYPE>8-K<TEXT>a</TEXT> but it goes o") == [False]
    for n in range(len("<DOCUMENT>\n<TYPE>8-K\n<TEXT>\n"), 9, -1):
        assert cut(b"<DOCUMENT>\n<TYPE>8-K\n<TEXT>\n"[:n]) == [False]


def test_words_between_documents_are_handed_out():
    one, two = TAGGED["plain"].format("8-K", "a"), TAGGED["one line"].format("EX-1", "b")
    assert found(f"{one}lost words{two}more".encode()) == [("8-K", "a"), "lost words", ("EX-1", "b"), "more"]


def test_a_document_starts_without_its_tag_after_the_end_of_another():
    two = TAGGED["plain"].format("EX-1", "b")
    assert found((TAGGED["plain"].format("8-K",
        "a") + two.removeprefix("<DOCUMENT>") + two).encode()) == [("8-K", "a"), ("EX-1", "b"), ("EX-1", "b")]


def test_several_submissions_in_a_file_have_each_their_header():
    one = "<SUBMISSION><ACCESSION-NUMBER>{0}<FILER><CIK>{0}</FILER><DOCUMENT><TYPE>8-K<TEXT>{0}</TEXT></DOCUMENT></SUBMISSION>\n"
    assert [h["cik"] for h, _ in submission((one.format(7) + one.format(8)).encode())] == ["7", "8"]


def uu(name, payload):
    "A uuencoded file."
    lines = b"".join(binascii.b2a_uu(payload[i:i + 45]) for i in range(0, len(payload), 45))
    return b"begin 644 " + name + b"\n" + lines + b"`\nend\n"


@given(st.binary(min_size=1, max_size=400), words, words, st.sampled_from([b"\n", b"\r\n", b"\r"]))
@settings(deadline=None)
def test_uuencoded_files_are_cut_out_of_texts(payload, before, after, eol):
    data = before.encode().replace(b"\n", eol) + eol + uu(b"a file.gif", payload).replace(b"\n",
        eol) + after.encode().replace(b"\n", eol)
    text, names = cut_uuencoded(data)
    assert names == ["a file.gif"] and text.split() == (before + " " + after).encode().split()


@pytest.mark.parametrize("text", [b"begin 644 days after\nthe closing date of it",
    b"we begin 644 a.gif\nM" + b"A" * 60, b"begin 644 a.gif",
                                  b"begin 644 a.gif\n\nMARCH", b"begin 64 a.gif\nM" + b"A" * 60])
def test_words_that_only_begin_like_a_file_are_left(text): assert cut_uuencoded(text) == (text, [])


def test_an_uuencoded_file_that_breaks_off_takes_no_words_with_it():
    text, names = cut_uuencoded(uu(b"a.pdf", bytes(90))[:-6] + b"These words stay.\n")
    assert names == ["a.pdf"] and text.strip() == b"These words stay."


@pytest.mark.fault
def test_payloads_are_skipped_at_a_hundred_megabytes_a_second():
    payload = uu(b"a.pdf", random.Random(1).randbytes(15_000_000))
    data = WRAPPED["sec"].format("<DOCUMENT>\n<TYPE>8-K\n<TEXT>\na\n</TEXT>\n</DOCUMENT>\n<DOCUMENT>\n<TYPE>EX-1\n<TEXT>\nPAYLOAD</TEXT>\n</DOCUMENT>\n"
                                 ).encode().replace(b"PAYLOAD", payload)
    def skip(): assert [p.head["type"] for _, p in submission(data)] == ["8-K", "EX-1"]
    assert len(data) / 1e6 / min(seconds(skip) for _ in range(3)) > 100


@pytest.mark.fault
@pytest.mark.parametrize("piece", ["<DOCUMENT>", "<DOCUMENT>\n<TYPE>8-K\n<TEXT>\na\n", "</TEXT>",
    "</DOCUMENT>x", "<TYPE>", "A:", "<", " ", "-----END",
                                   "begin 644 a\n", "M\n", "FILER:\n"])
def test_hostile_repetition_is_read_in_linear_time(piece):
    def read(n):
        data = (SEC.format("") + piece * (n // len(piece)) + "<DOCUMENT><TYPE>8-K<TEXT>a" + piece * (n // len(piece))).encode()
        list(submission(data)), cut_uuencoded(data), read_header(data.decode())
    assert is_linear(read, 200_000)


@pytest.mark.oracle
def test_secsgml_finds_the_same_documents(dev_data):
    secsgml = pytest.importorskip("secsgml")
    for path in sorted((dev_data / "sec" / "submissions").iterdir()):
        data = path.read_bytes()
        meta, bodies = secsgml.parse_sgml_content_into_memory(bytes_content=data)
        parts = [p for _, p in submission(data)]
        assert [p.head["type"] for p in parts] == [d[b"type"].decode() for d in meta[b"documents"]], path.name
        for body, part in zip(bodies, parts):
            if b"\nbegin 6" in part.body() or part.body().lstrip().startswith((b"<XML>", b"<XBRL>")): continue
            assert body.split() == part.body().split(), path.name
