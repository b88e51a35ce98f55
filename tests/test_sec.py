"""Filings: figures kept and none made up, nothing hidden shown, tables as printed, furniture apart."""
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import assets
from domain_adapt.sources.sec import (Unreadable, decode, documents, fidelity, figures, lines, parse, read_filing,
                                      table_rows, to_markdown, visible_text)

BREAK = '<hr style="page-break-after:always"/>'


def check(page: str) -> str:
    "The page's Markdown, once it is sure that its body's figures are all there and no others."
    rendered, truth = to_markdown(page), visible_text(page)
    found = fidelity(truth, rendered.text, "\n".join(rendered.furniture))
    assert found.kept == found.body and found.invented == 0, (figures(truth), rendered.text)
    return rendered.text


def table(page: str) -> list[list[str]]: return table_rows(parse(page).find(".//table"))


@pytest.mark.parametrize("secret", [
    '<div style="display:none">{}</div>', '<div style="DISPLAY: none;">{}</div>', '<p style="visibility:hidden">{}</p>',
    "<ix:header><ix:hidden><ix:nonFraction name='us-gaap:X' contextRef='c'>{}</ix:nonFraction></ix:hidden></ix:header>",
    "<script>{}</script>", "<style>{}</style>", "<!-- {} -->", "<?pi {} ?>", "<p hidden>{}</p>", "<head><title>{}</title></head>",
    '<table><tr><td>a</td><td style="display:none">{}</td></tr><tr style="display:none"><td>{}</td></tr></table>',
    '<table style="display:none"><tr><td>{}</td><td>{}</td></tr><tr><td>1</td><td>2</td></tr></table>'])
def test_hidden_text_never_shows(secret):
    page = f"<html><body><p>Before 1.</p>{secret.format('leak 98765', 'leak 43210')}<p>After 2.</p></body></html>"
    text = check(page)
    assert "leak" not in text and not {"98765", "43210"} & set(figures(text)) and "Before 1." in text and "After 2." in text


def test_inline_xbrl_is_looked_through():
    text = check("<p>Net sales of $<ix:nonFraction name='a' scale='6'>1,2<b>34</b></ix:nonFraction> million"
                 "<ix:nonNumeric name='b'><div>in a block</div></ix:nonNumeric> end</p>")
    assert text.split("\n\n") == ["Net sales of $1,234 million", "in a block", "end"]


@pytest.mark.parametrize("cells, printed", [
    ("<td>$</td><td>(1,234</td><td>)</td>", ["$(1,234)"]), ("<td>(</td><td>5.1</td><td>)%</td>", ["(5.1)%"]),
    ("<td>$</td><td>—</td>", ["$—"]), ("<td>12</td><td>%</td><td>(a)</td>", ["12% (a)"]), ("<td>€</td><td>7</td>", ["€7"]),
    ("<td>$ (8)</td>", ["$(8)"]), ("<td>520</td><td>bps</td>", ["520 bps"]), ("<td>1</td><td>2</td>", ["1", "2"]),
    ("<td>$</td><td></td><td></td><td></td><td>9</td>", ["$", "9"]), ("<td>.5</td><td>% Change</td>", [".5", "% Change"])])
def test_signs_join_their_figure(cells, printed):
    assert table(f"<table><tr><td>Label</td>{cells}</tr></table>") == [["Label", *printed]]


def test_headings_stand_over_their_columns():
    assert table("""<table>
        <tr><td></td><td></td><td colspan="7">Years ended</td></tr>
        <tr><td></td><td></td><td colspan="3">2025</td><td></td><td colspan="3">2024</td></tr>
        <tr><td colspan="9">Revenue:</td></tr>
        <tr><td>Products</td><td></td><td>$</td><td>10</td><td></td><td></td><td>$</td><td>9</td><td></td></tr>
        <tr><td>Services</td><td></td><td colspan="2">(8</td><td>)</td><td></td><td colspan="2">7</td><td>%</td></tr>
        </table>""") == [["", "Years ended", ""], ["", "2025", "2024"], ["Revenue:", "", ""], ["Products", "$10", "$9"],
                         ["Services", "(8)", "7%"]]


def test_a_spanned_cell_is_printed_once():
    assert table("""<table><tr><td rowspan="3">Fiscal 2025</td><td>a</td><td rowspan="2">77</td></tr>
        <tr><td>b</td></tr><tr><td>c</td><td>88</td></tr></table>""") == [
            ["Fiscal 2025", "a", "77"], ["", "b", ""], ["", "c", "88"]]


@pytest.mark.parametrize("page", [
    "<table><td>1</td><td>2</td><tr><td>3</td><td>4</td></tr></table>", "<table><tr><td>1<td>2<tr><td>3<td>4</table>",
    "<table><tr><td/><td>1</td><td colspan='0'>2</td></tr><tr><td colspan='x'>3</td><td rowspan='99999'>4</td></tr></table>",
    "<table><tr><td>a<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table></td><td>5</td></tr></table>",
    "<div><td>1</td><td>2</td></div>", "<p>6<table></table>7", "<table><tr><td></td></tr></table>7",
    "<html><body><p>1</p></body></html><p>2</p><table><tr><td>3</td><td>4</td></tr></table>",
    "<p>1<sup>2</sup>3<sub>4</sub>5</p>", "<p>1<br/>2<br>3</p>", "<p>1,2</p><p>34</p>", "<p>1&#8203;2</p>", "<p>7&#133;8&#150;9</p>",
    "<pre>a  1\n b 2</pre>", "<ol><li>seven</li><li>8</li></ol>", "<p>a | 5 | b * 6 _ 7 # 8</p>", "<h1>2025</h1><p>1. one</p><p># 2</p>",
    "<p>⟦1⟧ and 2</p>", '<div style="padding-left:9pt">1</div><span>2</span><span style="padding-left:3pt">3</span>'])
def test_figures_survive_bad_html(page): check(page)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("<p> <td> <tr> <table> </table> </td> </p> <div> </div> <b> <br> 12 7, .5 $ ( ) % word <li> <sup> </sup> "
                                "<h2> <pre> </html> &lt; &#0; &#xD800; \x00 \x85 \ud800 <ix:x> <!-- --> <p/> <td/> <DOCUMENT>".split(" ")), max_size=30))
def test_any_page_is_read_whole_or_refused(pieces):
    try: check(" ".join(["<p>", *pieces]))
    except Unreadable: assert pieces.count("<DOCUMENT>") > 1


signs = st.sampled_from(["", "$", "(", ")", "%", "—", "Net sales", "2025", "1,234", "0.5", "(17", "$ 8", "9)", "(a)", "*"])
cells = st.tuples(signs, st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(cells, max_size=6), min_size=1, max_size=5))
def test_no_table_loses_or_makes_up_a_figure(rows):
    html = "".join("<tr>" + "".join(f'<td colspan="{c}" rowspan="{r}">{t}</td>' for t, c, r in row) + "</tr>" for row in rows)
    check(f"<p>x</p><table>{html}</table>")
    printed = [x for r in table(f"<table>{html}</table>") for x in r]
    assert re.sub(r"\s", "", "".join(printed)) == re.sub(r"\s", "", "".join(t for row in rows for t, _, _ in row))
    assert len({len(r) for r in table(f"<table>{html}</table>")}) <= 1


def pages(footer: str, header: str = "", n: int = 8) -> str:
    words = "oak elm ash fir yew bay fig gum".split()
    return "".join(f"<p>The {w} grew by {i * 7}%.</p><p>{footer.format(i)}</p>{BREAK}{header and f'<p>{header}</p>'}"
                   for i, w in zip(range(3, 3 + n), words)) + "<p>End.</p>"


@pytest.mark.parametrize("footer", ["{}", "- {} -", "Page {}", "F-{}", "Acme Inc. | 2025 Form 10-K | {}", "{} Acme Annual Report"])
def test_page_numbers_are_furniture(footer):
    rendered = to_markdown(pages(footer, "Table of Contents"))
    assert rendered.text.split("\n\n") == [f"The {w} grew by {i * 7}%." for i, w in zip(range(3, 11), "oak elm ash fir yew bay fig gum".split())] + ["End."]
    assert Counter(rendered.furniture) == Counter(["Table of Contents"] * 8 + [footer.format(i) for i in range(3, 11)])


def test_footers_that_name_their_chapter_count_on():
    chapters = "Balance Sheets,Cash Flows,Equity,Notes,Leases,Debt,Taxes,Segments".split(",")
    page = "".join(f"<p>The year {y} was good.</p><p>{c} {n}</p>{BREAK}" for n, (c, y) in enumerate(zip(chapters, range(2011, 2019)), 40))
    assert to_markdown(page).furniture == [f"{c} {n}" for n, c in enumerate(chapters, 40)]


def test_furniture_is_only_beside_a_page_break():
    page = "<p>7</p><p>Acme</p><p>Text 8.</p><p>Acme</p>" * 5
    assert to_markdown(page).furniture == []
    few = f"<p>One.</p><p>Acme in 2024</p>{BREAK}<p>Two.</p><p>Acme in 2024</p>{BREAK}<p>Three.</p>"
    assert to_markdown(few).furniture == []


def test_unit_lines_stay_where_a_table_needs_them():
    grid = "<table><tr><td>a</td><td>{}</td></tr><tr><td>b</td><td>2</td></tr></table>"
    page = "".join(f"<p>Acme Inc.</p><p>(in millions)</p>{grid.format(i) if i % 2 else f'<p>Prose on {w} {i}.</p>'}{BREAK}"
                   for i, w in enumerate("oak elm ash fir yew bay fig gum".split()))
    rendered = to_markdown(page)
    assert rendered.text.count("(in millions)") == 4 == rendered.furniture.count("(in millions)")
    assert "Acme" not in rendered.text


def test_text_and_tables_run_over_the_page():
    row = "<tr><td>{0}</td><td>{0}1</td></tr>"
    page = f"""<p>The sentence goes</p><p>1</p>{BREAK}<p>on here.</p><p>2</p>{BREAK}<p>A new one.</p>
        <table>{row.format(3)}{row.format(4)}</table><p>3</p>{BREAK}<table>{row.format(5)}{row.format(6)}</table>"""
    assert check(page) == "The sentence goes on here.\n\nA new one.\n\n| 3 | 31 |\n|---|---|\n| 4 | 41 |\n| 5 | 51 |\n| 6 | 61 |"


def test_headings_and_lists():
    page = """<p><b>FORM 10-K</b></p><div style="font-weight:700">PART I</div><p><b>Item 1.</b> <b>Business</b></p>
        <p><b>Bold</b> beginning</p><table><tr><td><b>Competition</b></td></tr></table>
        <p>&#8226;one</p><table><tr><td>&#8226;</td><td>two</td></tr></table>"""
    assert check(page) == "FORM 10-K\n\n# PART I\n\n## Item 1. Business\n\nBold beginning\n\n### Competition\n\n- one\n- two"


def test_lost_prose_falls_back_to_our_own():
    "trafilatura spaces out underscores and drops a paragraph said twice in a short run; neither may reach the text."
    page = "<p>from ____ to ____ 5</p>" + "<table><tr><td>a</td><td>1</td></tr><tr><td>b</td><td>2</td></tr></table>" + "<p>Fine 6.</p>"
    rendered = to_markdown(page)
    assert rendered.fallbacks == 1 and rendered.runs == 2
    assert rendered.text.startswith("from ____ to ____ 5\n\n| a | 1 |") and rendered.text.endswith("Fine 6.")


@pytest.mark.parametrize("page", [
    "<SEC-DOCUMENT>0000000042-25-000001.txt\n<DOCUMENT>\n<TYPE>10-K\n<TEXT><html><p>1</p></html></TEXT></DOCUMENT>",
    "-----BEGIN PRIVACY-ENHANCED MESSAGE-----\n<html>", "<DOCUMENT><TYPE>10-K<TEXT><p>1</p></DOCUMENT>\n<document><TYPE>EX-1<TEXT><p>2</p>",
    "", "only words", "<DOCUMENT><TYPE>10-K<TEXT>\n<PAGE>\n<TABLE>\n<S>  <C>\nCash  $ 5\n</TABLE>", '{"json": 1}'])
def test_what_is_no_html_document_is_refused(page):
    with pytest.raises(Unreadable): parse(page)


@pytest.mark.parametrize("head", ["<DOCUMENT>\n<TYPE>10-K405\n<SEQUENCE>1\n<TEXT>\n", "<DOCUMENT><TYPE>10-K405<SEQUENCE>1<TEXT>"])
def test_an_envelope_names_the_form_and_leaves_no_text(tmp_path, head):
    (tmp_path / "a.htm").write_text(head + "<html><body><p>Words 5</p></body></html>\n</TEXT>\n</DOCUMENT>")
    doc = read_filing(tmp_path / "a.htm")
    assert doc.text == "Words 5" and doc.metadata["form"] == doc.metadata["document_type"] == "10-K405"


def test_metadata(tmp_path):
    dei = dict(DocumentType="10-K", EntityRegistrantName="Acme &amp; Co.", EntityCentralIndexKey="0000000042",
               DocumentPeriodEndDate="September\u00a027, 2025")
    facts = "".join(f'<p>A<ix:nonNumeric name="dei:{k}" contextRef="c">{v}</ix:nonNumeric></p>' for k, v in dei.items())
    path = tmp_path / "acme_000000004225000001.html"
    path.write_bytes(f"<html>{facts}<p>5 €</p></html>".encode("cp1252"))
    assert read_filing(path).metadata == dict(
        title="Acme & Co. 10-K 2025-09-27", date="2025-09-27", url="https://www.sec.gov/Archives/edgar/data/42/000000004225000001",
        cik="42", company="Acme & Co.", form="10-K", filed="", period="2025-09-27", sic="", accession="0000000042-25-000001",
        document_type="10-K")
    assert read_filing(path).text.endswith("5 €")
    (tmp_path / "old.htm").write_text("<p>Annual report on FORM 10-K</p>")
    assert read_filing(tmp_path / "old.htm").metadata["form"] == "10-K"
    with pytest.raises(Unreadable, match="unknown kind of file .jpg"): list(documents(tmp_path / "x.jpg"))


def test_decode():
    assert decode("€ 5".encode()) == decode("€ 5".encode("cp1252")) == decode("\ufeff€ 5".encode()) == "€ 5"


def words(text: str) -> Counter: return Counter(re.findall(r"[^\W\d_]+", text))


def faithful(path) -> None:
    "All of a real filing: every word and figure of the body once, nothing hidden, furniture that looks like it."
    page = decode(path.read_bytes())
    root = parse(page)
    truth, rendered, everything = visible_text(root), to_markdown(root), "\n".join(root.itertext())
    furniture = "\n".join(rendered.furniture)
    found = fidelity(truth, rendered.text, furniture)
    assert found.kept == found.body > 1000 and found.invented == 0, found
    assert words(rendered.text) + words(furniture) == words(truth)
    hidden = set(words(everything)) - set(words(truth))
    assert not hidden & set(words(rendered.text))
    assert max(map(len, rendered.furniture)) < 150
    breaks = sum(x.page for x in lines(root))
    assert figures(furniture).total() <= 3 * (breaks + 1)
    assert rendered.fallbacks <= 1
    grid = [row for line in lines(root) for row in line.rows]
    assert not [r for r in grid if any(map(figures, r[1:])) and any(re.fullmatch(r"[$€£)%]|\)%", x) for x in r)]


@pytest.mark.parametrize("name", ["aapl_2025_10k", "amzn_2026_10k", "tgt_2026_10k"])
def test_every_figure_of_the_quickstart_filings(name):
    if not (assets.cache_folder() / "downloads" / assets.ASSETS["filings-10k"].file).is_file():
        pytest.skip(f"the filings are not in {assets.cache_folder()}")
    path = assets.resolve("package:filings-10k") / f"{name}.html"
    faithful(path)
    doc = read_filing(path)
    assert doc.metadata["form"] == "10-K" and doc.metadata["cik"] and doc.metadata["period"]
    expected = {"aapl": "| Net income | $112,010 | $93,736 | $96,995 |", "amzn": "| Operating income (loss) | $(2,656) | $3,792 | $4,750 |",
                "tgt": "| Net other income | (95) | (106) | (92) |"}[name.split("_")[0]]
    assert expected in doc.text


def test_every_figure_of_other_filings(dev_data):
    for path in sorted((dev_data / "sec" / "html").glob("*.html")): faithful(path)


MADE = """<html><body><p>a<span style="display:none">1</span>2<sup>3</sup>4</p><div>5<span>6</span></div>7<br>8
<table><tr><td>9</td><td>10</td></tr><tr><td style="display:none">11</td><td>1<b>2</b></td></tr></table>
<ul><li>13</li><li>14</li></ul><p style="visibility:hidden">15</p><p style="color:white;font-size:3pt">16</p>
<ix:nonFraction name="x">17</ix:nonFraction><div style="display:none"><ix:header>18</ix:header></div></body></html>"""


@pytest.mark.browser
def test_visible_text_is_what_chromium_shows(tmp_path, dev_data):
    api = pytest.importorskip("playwright.sync_api")
    (tmp_path / "made.html").write_text(MADE)
    files = [tmp_path / "made.html", *sorted((dev_data / "sec" / "html").glob("*.html"))[:3]]
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for file in files:
            page = browser.new_page()
            page.goto(f"file://{file}", wait_until="domcontentloaded")
            page.evaluate("for (const e of document.querySelectorAll('sup,sub')) { e.before(' '); e.after(' ') }")
            assert figures(page.evaluate("document.body.innerText")) == figures(visible_text(decode(file.read_bytes()))), file
            page.close()
        browser.close()


def chromium() -> str:
    import shutil
    return shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("no Chromium here")
