"""XML of journals and patent offices: cut right at any block size, no entity expanded, nothing quadratic."""
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from domain_adapt.sources import tagged
from domain_adapt.sources.markdown import figures
from domain_adapt.sources.reading import Unreadable
from domain_adapt.sources.tagged import blocks, markdown, math_text, parse, split, table_blocks
from growth import is_linear

KINDS = dict(sec="section", title="title", p="block", list="block", item="item", label="label", term="term", fig="boxed", sup="sup",
             sub="sub", table="table", math="math", graphic="skip", **{"tex-math": "tex"})


def text(xml): return markdown(blocks(etree.fromstring(xml), KINDS, 2))


def table(xml): return table_blocks(etree.fromstring(xml), lambda el: "".join(el.itertext()))


@pytest.mark.parametrize("xml, want", [
    ("<p>10<sup>6</sup>.5 and x<sub>1</sub>2</p>", "10^6 .5 and x1 2"),
    ("<p>10<b><sup>6</sup></b>5</p>", "10^6 5"), ("<p>1<sub>2</sub></p>", "1_2"), ("<p>5<graphic/>10</p>", "5 10"),
    ("<p>Ca<sup>2+</sup>-rich, a<sup>1</sup><sup>,</sup><sup>2</sup></p>", "Ca^2+-rich, a^1,^2"),
    ("<p>R'<sub>1</sub> V<sub>in</sub> 2<sup>nd</sup> x<sup>n + 1</sup></p>", "R'1 V_in 2nd x^(n + 1)"),
    ("<sec><title>A</title><sec><title>B</title><p>c</p></sec><p>d</p></sec>", "### A\n\n#### B\n\nc\n\nd"),
    ("<fig><label>Figure 1</label><title>T.</title><p>c</p></fig>", "Figure 1. T.\n\nc"), ("<fig><label>Figure 1</label></fig>", "Figure 1."),
    ("<p>a<list><item>• b</item><item>1. c</item><item><p>d</p><list><item>e</item></list></item></list>f</p>",
     "a\n\n- b\n\n1. c\n\n- d\n  - e\n\nf"),
    ("<p><term>AKI</term><p>acute</p></p>", "AKI: acute"), ("<p>a\n  b\u00a0c</p>", "a b c"), ("<p/>", ""),
    ("<p>x <math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>3</p>", "x 1/2 3"),
    (r"<p><alt><tex-math>\begin{document}$$x_1$$\end{document}</tex-math><math><mi>x</mi></math></alt></p>", "$x_1$"),
])
def test_blocks(xml, want): assert text(xml) == want


@pytest.mark.parametrize("xml, want", [
    ("<msup><mi>x</mi><mrow><mi>n</mi><mo>+</mo><mn>1</mn></mrow></msup>", "x^(n+1)"), ("<msqrt><mi>a</mi><mi>b</mi></msqrt>", "√(ab)"),
    ("<mrow><mn>1</mn><mn>2</mn></mrow>", "1 2"), ("<mroot><mi>x</mi><mn>3</mn></mroot>", "(x)^(1/3)"),
    ("<mfenced open='['><mi>a</mi><mi>b</mi></mfenced>", "[a, b)"), ("<munderover><mo>∑</mo><mn>0</mn><mi>n</mi></munderover>", "(∑)_0^n"),
    ("<semantics><mn>5</mn><annotation>5</annotation></semantics>", "5"), ("<msup><mi>x</mi></msup>", "x"),
    ("<mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr><mtr><mtd><mn>3</mn></mtd></mtr></mtable>", "1, 2; 3")])
def test_math(xml, want): assert math_text(etree.fromstring(xml)) == want


def test_tables():
    assert table("<table><tr><td rowspan='2'>a</td><td colspan='2'>b</td></tr><tr><td>1</td><td>2</td></tr></table>") == [
        "| a | b |  |\n|---|---|---|\n|  | 1 | 2 |"]
    rows = "<row><entry morerows='1'>x</entry><entry>1</entry></row><row><entry>2</entry></row>"
    assert table(f"<table><tgroup><colspec colname='a'/><colspec colname='b'/><tbody>{rows}</tbody></tgroup></table>") == [
        "| x | 1 |\n|---|---|\n|  | 2 |"]
    rows = "<ROW><ENTRY NAMEST='b' NAMEEND='c'>wide</ENTRY></ROW><ROW><ENTRY>1</ENTRY><ENTRY>2</ENTRY><ENTRY>3</ENTRY></ROW>"
    specs = "".join(f"<COLSPEC COLNAME='{x}'/>" for x in "abc")
    assert table(f"<TBL><TGROUP>{specs}<TBODY>{rows}</TBODY></TGROUP></TBL>") == ["|  | wide |  |\n|---|---|---|\n| 1 | 2 | 3 |"]
    assert table("<table><caption>Doses</caption><tr><td>1</td><td>2</td></tr></table>") == ["Doses", "| 1 | 2 |\n|---|---|"]
    assert table("<table><tr><td/></tr></table>") == [] == table("<table/>")
    assert table("<table><tr><td colspan='zz' rowspan='-3'>1|2</td><td>3</td></tr></table>") == ["| 1\\|2 | 3 |\n|---|---|"]


CELL = st.tuples(st.sampled_from(["1", "22", "", "a"]), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELL, max_size=5), max_size=6), st.booleans())
def test_a_table_keeps_and_repeats_nothing(rows, twice):
    cells = [["<entry%s>%s</entry>" % (f" morerows='{d - 1}'" * (d > 1), t) for t, _, d in r] for r in rows]
    group = "<tgroup>" + "".join(f"<row>{''.join(r)}</row>" for r in cells) + "</tgroup>"
    html = "".join("<tr>" + "".join(f"<td colspan='{w}' rowspan='{d}'>{t}</td>" for t, w, d in r) + "</tr>" for r in rows)
    want = figures(" ".join(t for r in rows for t, _, _ in r))
    assert figures("\n".join(table(f"<table>{html}</table>"))) == want
    double = figures(" ".join(t for r in rows * (1 + twice) for t, _, _ in r))
    assert figures("\n".join(table(f"<table>{group * (1 + twice)}</table>"))) == double


PIECES = st.lists(st.sampled_from([b"<p>", b"</p>", b"<s>", b"</s>", b'<?xml version="1.0"?>', b"<pp>", b"text 5", b"<p a='1'>",
                                   b"</p >", b"<!DOCTYPE p [<!ENTITY a 'b'>]>", b"<", b">", b"<x:p>", b"</x:p>"]), max_size=25)


def cut(data: bytes) -> list[tuple[str, bytes, bool]]:
    "The same cuts by a plain scan over the whole of it."
    out, root, start = [], "", 0
    for m in re.finditer(rb"<(?:(/?)(?:\w+:)?([ps])(?=[\s>])|\?xml\s)", data):
        name = (m[2] or b"").decode()
        if m[1]:
            if root and name != root: continue
            end = data.find(b">", m.end()) + 1 or len(data)
            out.append((name, data[start if root else None:end] if root else b"", not root))
            root = ""
        elif not root or name != "s":
            if root: out.append((root, data[start:m.start()], True))
            root, start = name, m.start()
    return out + [(root, data[start:], True)] * bool(root)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.integers(1, 400))
def test_cuts_are_the_same_at_any_block_size(pieces, size):
    data, tagged._block = b"".join(pieces), size
    try: got = [(root, data if not damage or "off" in damage else b"", bool(damage)) for root, data, damage in
                split(io.BytesIO(data), ("p",), ("s",))]
    finally: tagged._block = 1 << 20
    assert got == cut(data)


def test_a_document_larger_than_the_limit_is_skipped(monkeypatch):
    monkeypatch.setattr(tagged, "LARGEST", 1000)
    monkeypatch.setattr(tagged, "_block", 100)
    week = b"<p>1</p>" + b"<p>" + b"x" * 5000 + b"</p>" + b"<p>2</p>"
    assert [(data if not damage else b"", damage) for _, data, damage in split(io.BytesIO(week), ("p",))] == [
        (b"<p>1</p>", ""), (b"", "too large"), (b"<p>2</p>", "")]


def test_no_entity_is_expanded(tmp_path):
    (secret := tmp_path / "secret").write_text("hidden")
    dtd = f'<!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;"><!ENTITY x SYSTEM "file://{secret}">]>'
    (_, data, damage), = split(io.BytesIO(f"{dtd}<p>&a; &b; &x; &eacute;</p>".encode()), ("p",))
    assert not damage and parse(data).text == "&a; &b; &x; é"
    with pytest.raises(Unreadable): parse(f"{dtd}<p>&b;</p>".encode() + b"<p>")
    assert "".join(parse(b"<p>5 <q>6</p> 7</q></p>").itertext()).split() == ["5", "6", "7"]
    assert parse(b"<p><![CDATA[a & b <c> &amp;]]></p>").text == "a & b <c> &amp;"
    assert parse(b"<p>&#65;&#0;&#xFFFF;B</p>").text == "AB"


@pytest.mark.parametrize("broken", [b"<p>a < b</p>", b"<p>" + b"<q>" * 3000 + b"5" + b"</q>" * 3000 + b"</p>", b"<p>x", b"", b"<p><!-- </p>",
                                    b"<p>1</p><p>2</p>"])
def test_what_recovery_would_lose_is_unreadable(broken):
    with pytest.raises(Unreadable): parse(broken)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_through(said):
    el = etree.Element("p")
    try: el.text = said
    except ValueError: return
    got = parse(etree.tostring(el, encoding="utf-8"))
    assert "".join((got.text or "").split()) == "".join(said.replace("\r", "\n").split())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_unreadable(data):
    for piece in (data, b"<p>" + data + b"</p>"):
        try: blocks(parse(piece), KINDS)
        except Unreadable: pass


@pytest.mark.parametrize("piece", ["<p>", "</p>", "&", "&a", "<!--", "<q>", "<sup>1</sup>", "<label>1</label>", "<td>1</td>", "<math><mi>x</mi></math>",
                                   "<table><tr><td rowspan='9999' colspan='400'>1</td></tr></table>", "<tr><td>1</td></tr>",
                                   "<tr><td colspan='1000' rowspan='999'>1</td></tr>", "<item>- a</item>", "<q a=b c=d>", "1", "<?x"])
@pytest.mark.parametrize("wrap", ["{}", "<table>{}</table>", "<table><tgroup/>{}</table>"])
def test_no_input_takes_quadratic_time(piece, wrap):
    def read(size):
        for _, cutting, damage in split(io.BytesIO(f"<p>{wrap.format(piece * (size // len(piece)))}</p>".encode()), ("p",)):
            try: blocks(parse(cutting), KINDS) if not damage else None
            except Unreadable: pass
    assert is_linear(read, 50_000)
