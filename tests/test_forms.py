"""Forms in XML: readable, and every value in them kept."""

import pytest
from hypothesis import given, settings, strategies as st

from domain_adapt.sources.forms import MOST_COLUMNS, form_markdown, label, ownership_markdown, parse_xml
from domain_adapt.sources.markdown import figures
from domain_adapt.sources.reading import Unreadable
from domain_adapt.sources.sgml import submission
from growth import is_linear

OWNERSHIP = """<XML>
<?xml version="1.0"?>
<ownershipDocument><schemaVersion>X0508</schemaVersion><documentType>4/A</documentType><periodOfReport>2025-01-10</periodOfReport>
<dateOfOriginalSubmission>2025-01-12</dateOfOriginalSubmission><notSubjectToSection16>true</notSubjectToSection16>
<issuer><issuerCik>0000000042</issuerCik><issuerName>ACME CORP</issuerName><issuerTradingSymbol>ACM</issuerTradingSymbol></issuer>
<reportingOwner><reportingOwnerId><rptOwnerCik>0000000008</rptOwnerCik><rptOwnerName>Doe Jane</rptOwnerName></reportingOwnerId>
<reportingOwnerAddress><rptOwnerStreet1>5 MAIN ST</rptOwnerStreet1><rptOwnerStreet2/><rptOwnerCity>DALE</rptOwnerCity></reportingOwnerAddress>
<reportingOwnerRelationship><isDirector>0</isDirector><isOfficer>true</isOfficer><isTenPercentOwner>1</isTenPercentOwner>
<officerTitle>CFO &amp; Secretary</officerTitle></reportingOwnerRelationship></reportingOwner>
<reportingOwner><reportingOwnerId><rptOwnerCik>0000000009</rptOwnerCik><rptOwnerName>Doe Trust</rptOwnerName></reportingOwnerId></reportingOwner>
<aff10b5One>1</aff10b5One>
<nonDerivativeTable><nonDerivativeTransaction><securityTitle><value>Common Stock</value><footnoteId id="F2"/></securityTitle>
<transactionDate><value>2025-01-09</value></transactionDate><transactionCoding><transactionFormType>4</transactionFormType>
<transactionCode>S</transactionCode><equitySwapInvolved>0</equitySwapInvolved><footnoteId id="F1"/></transactionCoding>
<transactionTimeliness><value>L</value></transactionTimeliness>
<transactionAmounts><transactionShares><value>1500</value></transactionShares><transactionPricePerShare><footnoteId id="F1"/></transactionPricePerShare>
<transactionAcquiredDisposedCode><value>D</value></transactionAcquiredDisposedCode></transactionAmounts>
<postTransactionAmounts><sharesOwnedFollowingTransaction><value>37565</value></sharesOwnedFollowingTransaction></postTransactionAmounts>
<ownershipNature><directOrIndirectOwnership><value>I</value></directOrIndirectOwnership><natureOfOwnership><value>By trust | 401(k)</value>
</natureOfOwnership></ownershipNature></nonDerivativeTransaction>
<nonDerivativeHolding><securityTitle><value>Class B</value></securityTitle><postTransactionAmounts><valueOwnedFollowingTransaction><value>88</value>
</valueOwnedFollowingTransaction></postTransactionAmounts></nonDerivativeHolding></nonDerivativeTable>
<derivativeTable><derivativeHolding><securityTitle><value>Option</value></securityTitle><conversionOrExercisePrice><value>12.5</value>
</conversionOrExercisePrice><exerciseDate><footnoteId id="F2"/></exerciseDate><underlyingSecurity><underlyingSecurityTitle><value>Common Stock</value>
</underlyingSecurityTitle><underlyingSecurityShares><value>7000</value></underlyingSecurityShares></underlyingSecurity></derivativeHolding></derivativeTable>
<footnotes><footnote id="F1">Sold at $66.83 to
 $66.98.</footnote><footnote id="F2">Vests.</footnote></footnotes><remarks>See exhibit 24.</remarks>
<ownerSignature><signatureName>/s/ J. Doe</signatureName><signatureDate>2025-01-11</signatureDate></ownerSignature></ownershipDocument>
</XML>"""


def test_an_ownership_document_reads_like_this():
    assert ownership_markdown(parse_xml(OWNERSHIP)) == """# Form 4/A: statement of changes in beneficial ownership of securities

Period of report: 2025-01-10
Date of original submission: 2025-01-12
Not subject to section: yes
Issuer: ACME CORP (ACM), CIK 0000000042
Reporting owner: Doe Jane, CIK 0000000008, 5 MAIN ST, DALE
Relationship to the issuer: officer, ten percent owner, CFO & Secretary
Reporting owner: Doe Trust, CIK 0000000009
Made under a pre-arranged trading plan: yes

## Non-derivative securities

| Security | Transaction date | Transaction | Form | Transaction timeliness | Shares | Price per share | Acquired or disposed of | Shares owned afterwards | Ownership | Nature of ownership | Value owned afterwards |
|---|---|---|---|---|---|---|---|---|---|---|---|
| Common Stock [F2] | 2025-01-09 | [F1] S (sale) | 4 | L (late) | 1500 | [F1] | D (disposed of) | 37565 | I (indirect) | By trust \\| 401(k) |  |
| Class B |  |  |  |  |  |  |  |  |  |  | 88 |

## Derivative securities

| Security | Conversion or exercise price | Exercise date | Underlying security title | Underlying security shares |
|---|---|---|---|---|
| Option | 12.5 | [F2] | Common Stock | 7000 |

## Footnotes

[F1] Sold at $66.83 to $66.98.

[F2] Vests.

## Remarks

See exhibit 24.

## Signatures

/s/ J. Doe, 2025-01-11"""


def values(root, flags):
    "Figures of every value in a form but flags and its schema version, and of the marks of its footnotes."
    said = [el.text or "" for el in root.iter() if el.tag != "schemaVersion" and not (flags and (el.text or "").strip() in ("0", "1"))]
    return figures("\n".join(said + [x for el in root.iter("footnote", "footnoteId") for x in el.attrib.values()]))


def test_real_ownership_documents_keep_every_figure(dev_data):
    seen = 0
    for path in sorted((dev_data / "sec" / "submissions").iterdir()):
        for _, part in submission(path.read_bytes()):
            if b"<ownershipDocument" not in part.body()[:500]: continue
            root, seen = parse_xml(part.body().decode()), seen + 1
            assert figures(ownership_markdown(root)) == values(root, flags=True)
    assert seen == 2


def test_real_forms_keep_every_figure(dev_data):
    for name in ("edgartools_0001398344-24-000491.nc", "edgartools_0002002260-24-000001.nc"):
        (_, part), = submission((dev_data / "sec" / "submissions" / name).read_bytes())
        root = parse_xml(part.body().decode())
        kept = figures(form_markdown(root))
        assert kept - figures("40") == figures("\n".join(el.text or "" for el in root.iter())) and kept["40"] == 1   # is40Act


def test_a_table_of_holdings():
    row = "<infoTable><nameOfIssuer>{0}</nameOfIssuer><shrs><amt>{1}</amt></shrs><voting><amt>{2}</amt></voting></infoTable>"
    root = parse_xml(f"<n1:informationTable xmlns:n1='urn:x' xmlns='urn:x'>{row.format('A', 1, 2)}{row.format('B', 3, 4)}</n1:informationTable>")
    assert form_markdown(root) == """# Information table

## Info table

| Name of issuer | Shrs amt | Voting amt |
|---|---|---|
| A | 1 | 2 |
| B | 3 | 4 |"""


def test_groups_attributes_and_words_between_elements():
    assert form_markdown(parse_xml("<a><b unit='USD'>5</b><c><d>x <i>y</i> z</d><yearOfInc><value>2004</value></yearOfInc></c><e/></a>")) == (
        "# A\n\nB Unit: USD\nB: 5\n\n## C\n\nD: x y z\nYear of inc: 2004")


@pytest.mark.parametrize("tag, words", [("rptOwnerStreet1", "Rpt owner street"), ("issuerCIK", "Issuer CIK"),
    ("CIKNumber", "CIK number"),
                                        ("is40Act", "Is40 act"), ("file-number", "File number"), ("b", "B"),
                                        ("1", "1")])
def test_labels(tag, words): assert label(tag) == words


tags = st.sampled_from(["alpha", "betaGamma", "value", "item", "infoTable"])
tree = st.recursive(st.tuples(tags, st.integers(0, 10**6).map(str)),
    lambda kids: st.tuples(tags, st.lists(kids, min_size=1, max_size=4)), max_leaves=25)


def written(node):
    "The XML of a made tree."
    return f"<{node[0]}>{node[1] if isinstance(node[1], str) else ''.join(map(written, node[1]))}</{node[0]}>"


@given(tree)
@settings(deadline=None)
def test_no_value_of_any_form_is_lost_or_made_up(node):
    root = parse_xml(f"<form>{written(node)}</form>")
    assert figures(form_markdown(root)) == figures(" ".join(x.text or "" for x in root.iter()))


def test_a_form_of_very_many_columns_is_lines():
    rows = "".join(f"<r><x{chr(97 + i % 26)}{chr(97 + i // 26)}>{i}</x{chr(97 + i % 26)}{chr(97 + i // 26)}><y>2</y></r>" for i in range(MOST_COLUMNS))
    assert "|" not in (text := form_markdown(parse_xml(f"<a>{rows}</a>"))) and text.count("Y: 2") == MOST_COLUMNS


@pytest.mark.fault
@pytest.mark.parametrize("text", ["", "<a>", "<a></b>", "<a>" * 5000, "words", "<a b='1' b='2'/>", "\x00",
    "<a>&bogus;</a>"])
def test_damage_is_unreadable(text):
    with pytest.raises(Unreadable): parse_xml(text)


@pytest.mark.fault
def test_entities_are_neither_fetched_nor_expanded(tmp_path):
    (tmp_path / "secret").write_text("secret 98765")
    inside = "".join(f"<!ENTITY x{n + 1} '{f'&x{n};' * 10}'>" for n in range(9))
    with pytest.raises(Unreadable, match="entity"): parse_xml(f"<!DOCTYPE a [<!ENTITY x0 'ha'>{inside}]><a>&x9;</a>")
    outside = f"<!DOCTYPE a [<!ENTITY f SYSTEM '{(tmp_path / 'secret').as_uri()}'>]><a><b>&f;</b></a>"
    assert form_markdown(parse_xml(outside)) == "# A\n\nB: &f;"


@pytest.mark.fault
@pytest.mark.parametrize("before, piece, after", [("<a>", "<b/>", "</a>"), ("<a>", "<b><c>1</c></b>", "</a>"),
    ("<a><x>", "<c>1</c>", "</x><x><c>2</c></x></a>"),
                                                  ("<a>", "x<b/>", "</a>"), ("<a>", "<b>1</b>", "</a>")])
def test_hostile_repetition_is_read_in_linear_time(before, piece, after):
    assert is_linear(lambda n: form_markdown(parse_xml(before + piece * (n // len(piece)) + after)), 50_000)
