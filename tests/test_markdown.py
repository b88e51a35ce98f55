"""Filings: figures kept and none made up, nothing hidden shown, tables as printed, furniture apart."""
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import assets
from domain_adapt.sources.markdown import (fidelity, figures, lines, parse, signs_joined, table_rows, tables,
                                           to_markdown, visible_text)
from domain_adapt.sources.reading import Unreadable, decode

BREAK = '<hr style="page-break-after:always"/>'
TREES = "oak elm ash fir yew bay fig gum".split()


def check(page: str) -> str:
    "The page's Markdown, once it is sure that its body's figures are all there and no others."
    rendered, truth = to_markdown(page), visible_text(page)
    found = fidelity(truth, rendered.text, "\n".join(rendered.furniture))
    assert found.kept == found.body and found.invented == 0, (figures(truth), rendered.text)
    return rendered.text


def table(page: str) -> list[list[str]]: return table_rows(parse(page).find(".//table"))


@pytest.mark.parametrize("secret", [
    '<div style="display:none">{}</div>', '<div style="DISPLAY: none;">{}</div>', "<p hidden>{}</p>",
    '<p style="visibility:hidden">{}</p>', "<script>{}</script>", "<style>{}</style>", "<!-- {} -->",
    "<?pi {} ?>",
    "<ix:header><ix:hidden><ix:nonFraction name='us-gaap:X'>{}</ix:nonFraction></ix:hidden></ix:header>",
    "<head><title>{}</title></head>", '<table><tr><td>a</td><td style="display:none">{}</td></tr></table>',
    '<table><tr><td>a</td></tr><tr style="display:none"><td>{}</td></tr></table>',
    '<table style="display:none"><tr><td>{}</td><td>2</td></tr><tr><td>1</td><td>2</td></tr></table>'])
def test_hidden_text_never_shows(secret):
    text = check(f"<html><body><p>Before 1.</p>{secret.format('leak 98765')}<p>After 2.</p></body></html>")
    assert "leak" not in text and "98765" not in figures(text)
    assert text.startswith("Before 1.") and text.endswith("After 2.")


def test_inline_xbrl_is_looked_through():
    text = check("<p>Net sales of $<ix:nonFraction name='a' scale='6'>1,2<b>34</b></ix:nonFraction> million"
                 "<ix:nonNumeric name='b'><div>in a block</div></ix:nonNumeric> end</p>")
    assert text.split("\n\n") == ["Net sales of $1,234 million", "in a block", "end"]


@pytest.mark.parametrize("cells, printed", [
    ("<td>$</td><td>(1,234</td><td>)</td>", ["$(1,234)"]), ("<td>(</td><td>5.1</td><td>)%</td>", ["(5.1)%"]),
    ("<td>$</td><td>—</td>", ["$—"]), ("<td>12</td><td>%</td><td>(a)</td>", ["12% (a)"]),
    ("<td>€</td><td>7</td>", ["€7"]), ("<td>$ (8)</td>", ["$(8)"]), ("<td>520</td><td>bps</td>", ["520 bps"]),
    ("<td>1</td><td>2</td>", ["1", "2"]), ("<td>.5</td><td>% Change</td>", [".5", "% Change"]),
    ("<td>$</td><td></td><td></td><td></td><td>9</td>", ["$", "9"])])
def test_signs_join_their_figure(cells, printed):
    assert table(f"<table><tr><td>Label</td>{cells}</tr></table>") == [["Label", *printed]]


def test_headings_stand_over_their_columns():
    assert table("""<table>
        <tr><td></td><td></td><td colspan="7">Years ended</td></tr>
        <tr><td></td><td></td><td colspan="3">2025</td><td></td><td colspan="3">2024</td></tr>
        <tr><td colspan="9">Revenue:</td></tr>
        <tr><td>Products</td><td></td><td>$</td><td>10</td><td></td><td></td><td>$</td><td>9</td></tr>
        <tr><td>Services</td><td></td><td colspan="2">(8</td><td>)</td><td></td><td colspan="2">7</td><td>%
        </table>""") == [["", "Years ended", ""], ["", "2025", "2024"], ["Revenue:", "", ""],
                         ["Products", "$10", "$9"], ["Services", "(8)", "7%"]]


def test_a_spanned_cell_is_printed_once():
    assert table("""<table><tr><td rowspan="3">Fiscal 2025</td><td>a</td><td rowspan="2">77</td></tr>
        <tr><td>b</td></tr><tr><td>c</td><td>88</td></tr></table>""") == [
            ["Fiscal 2025", "a", "77"], ["", "b", ""], ["", "c", "88"]]


TABLES = Path(__file__).parent / "tables"


def labelled() -> dict[str, Counter]:
    "The hand-made labels: for each table the (row label, column header, figure) of every figure."
    out = {}
    for table in (TABLES / "labels.txt").read_text().split("\n= ")[1:]:
        name, head, *rows = table.rstrip("\n").split("\n")
        heads = [x.strip() for x in head.split("|")[1:]]
        cells = [[x.strip() for x in row.split("|")] for row in rows]
        assert all(len(r) == len(heads) + 1 for r in cells), name
        out[name] = Counter((r[0], h, x) for r in cells for h, x in zip(heads, r[1:]) if x)
    return out


def read_back(markdown: str) -> Counter:
    "What a plain reader finds in Markdown tables: (row label, column header, figure) of every filled cell."
    out = Counter()
    for table in markdown.split("\n\n"):
        if not table.startswith("|"): continue
        first, _, *rows = [line.strip()[1:-1].split("|") for line in table.split("\n")]
        rows = [first, *rows]
        end = next((n for n, r in enumerate(rows[1:], 1) if r[0].strip()), len(rows))
        heads = [""] * len(first)
        for r in rows[:end]:
            for n in range(1, len(r)):
                if r[n] == "": r[n] = r[n - 1]
                heads[n] += f" {r[n].strip()}"
        for r in rows[end:]: out.update((r[0].strip(), h.strip(), x.strip()) for h, x in zip(heads[1:], r[1:]) if x.strip())
    return out


def bare(found: Counter) -> Counter:
    "The same without white space, and with one kind of apostrophe."
    out = Counter()
    for key, n in found.items(): out[tuple("".join(x.split()).replace("’", "'") for x in key)] += n
    return out


@pytest.mark.oracle
@pytest.mark.parametrize("name", sorted(labelled()))
def test_every_labelled_figure_is_read_back_with_its_row_and_column(name):
    wanted, page = bare(labelled()[name]), (TABLES / f"{name}.html").read_text()
    assert not wanted - bare(read_back(check(f"<html><body>{page}</body></html>")))
    assert wanted.total() > 5 and len(labelled()) == len(list(TABLES.glob("*.html"))) >= 30


@pytest.mark.parametrize("page", [
    "<table><td>1</td><td>2</td><tr><td>3</td><td>4</td></tr></table>",
    "<table><tr><td>1<td>2<tr><td>3<td>4</table>",
    "<table><tr><td/><td>1</td><td colspan='0'>2</tr><tr><td colspan='x'>3</td><td rowspan='9999'>4</table>",
    "<table><tr><td>a<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</table></td><td>5</td></table>",
    "<table><caption>Table 8</caption><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>",
    "<div><td>1</td><td>2</td></div>", "<p>6<table></table>7", "<table><tr><td></td></tr></table>7",
    "<html><body><p>1</p></body></html><p>2</p><table><tr><td>3</td><td>4</td></tr></table>",
    "<p>1<sup>2</sup>3<sub>4</sub>5</p>", "<p>1<br/>2<br>3</p>", "<p>1,2</p><p>34</p>", "<p>1&#8203;2</p>",
    "<p>7&#133;8&#150;9</p>", "<pre>a  1\n b 2</pre>", "<ol><li>seven</li><li>8</li></ol>",
    "<p>⟦1⟧ and 2</p>",
    "<p>a | 5 | b * 6 _ 7 # 8</p>", "<h1>2025</h1><p>1. one</p><p># 2</p>",
    '<div style="padding-left:9pt">1</div><span>2</span><span style="padding-left:3pt">3</span>'])
def test_figures_survive_bad_html(page): check(page)


PIECES = ["<p>", "</p>", "<table>", "</table>", "<tr>", "<td>", "</td>", "<div>", "</div>", "<b>", "<br>",
    "<li>", "<sup>",
          "</sup>", "<h2>", "<pre>", "</html>", "<ix:x>", "<!--", "-->", "<p/>", "<td/>", "<DOCUMENT>",
              BREAK, "&lt;", "&#0;",
          "&#xD800;", "\x00", "\x85", "\ud800", "12", "7,", ".5", "$", "(", ")", "%", "word"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_page_is_read_whole_or_refused(pieces):
    try: check(" ".join(["<p>", *pieces]))
    except Unreadable: assert pieces.count("<DOCUMENT>") > 1


SIGNS = ["", "$", "(", ")", "%", "—", "Net sales", "2025", "1,234", "0.5", "(17", "$ 8", "9)", "(a)", "*"]
CELLS = st.tuples(st.sampled_from(SIGNS), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELLS, max_size=6), min_size=1, max_size=5))
def test_no_table_loses_or_makes_up_a_figure(rows):
    cell = '<td colspan="{1}" rowspan="{2}">{0}</td>'
    trs = ["".join(cell.format(*c) for c in row) for row in rows]
    html = f"<table>{''.join(f'<tr>{tr}</tr>' for tr in trs)}</table>"
    check(f"<p>x</p>{html}")
    printed, squeeze = table(html), lambda texts: re.sub(r"\s", "", "".join(texts))
    assert squeeze(x for r in printed for x in r) == squeeze(t for row in rows for t, _, _ in row)
    assert len({len(r) for r in printed}) <= 1


@pytest.mark.parametrize("footer", ["{}", "- {} -", "Page {}", "F-{}", "Acme Inc. | 2025 Form 10-K | {}",
    "{} Acme Report"])
def test_page_numbers_are_furniture(footer):
    text = {n: f"The {tree} grew by {n * 7}%." for n, tree in enumerate(TREES, 3)}
    contents = "<p>Table of Contents</p>"
    page = "".join(f"<p>{t}</p><p>{footer.format(n)}</p>{BREAK}{contents}" for n, t in text.items())
    rendered = to_markdown(page + "<p>End.</p>")
    assert rendered.text.split("\n\n") == [*text.values(), "End."]
    assert Counter(rendered.furniture) == Counter(["Table of Contents"] * 8 + [footer.format(n)
        for n in text])


def test_footers_that_name_their_chapter_count_on():
    chapters = "Balance Sheets,Cash Flows,Equity,Notes,Leases,Debt,Taxes,Segments".split(",")
    text = "<p>The year {1} was good.</p><p>{2} {0}</p>" + BREAK
    page = "".join(text.format(n, 1971 + n, c) for n, c in enumerate(chapters, 40))
    assert to_markdown(page).furniture == [f"{c} {n}" for n, c in enumerate(chapters, 40)]


def test_furniture_is_only_beside_a_page_break():
    assert to_markdown("<p>7</p><p>Acme</p><p>Text 8.</p><p>Acme</p>" * 5).furniture == []
    few = f"<p>One.</p><p>Acme in 2024</p>{BREAK}<p>Two.</p><p>Acme in 2024</p>{BREAK}<p>Three.</p>"
    assert to_markdown(few).furniture == []


def test_unit_lines_stay_where_a_table_needs_them():
    grid = "<table><tr><td>a</td><td>{}</td></tr><tr><td>b</td><td>2</td></tr></table>"
    content = [grid.format(n) if n % 2 else f"<p>Prose on {tree} {n}.</p>" for n, tree in enumerate(TREES)]
    rendered = to_markdown("".join(f"<p>Acme Inc.</p><p>(in millions)</p>{x}{BREAK}" for x in content))
    assert rendered.text.count("(in millions)") == 4 == rendered.furniture.count("(in millions)")
    assert "Acme" not in rendered.text


def test_text_and_tables_run_over_the_page():
    row = "<tr><td>{0}</td><td>{0}1</td></tr>"
    page = f"""<p>The sentence goes</p><p>1</p>{BREAK}<p>on here.</p><p>2</p>{BREAK}<p>A new one.</p>
        <table>{row.format(3)}{row.format(4)}</table><p>3</p>{BREAK}
        <table>{row.format(5)}{row.format(6)}</table>"""
    assert check(page).split("\n\n") == ["The sentence goes on here.", "A new one.",
                                         "|  |  |\n|---|---|\n| 3 | 31 |\n| 4 | 41 |\n| 5 | 51 |\n| 6 | 61 |"]


def test_headings_and_lists():
    page = """<p><b>FORM 10-K</b></p><div style="font-weight:700">PART I</div>
        <p><b>Item 1.</b> <b>Business</b></p><p><b>Bold</b> beginning</p><table><tr><td><b>Competition</b></td></tr></table>
        <p>&#8226;one</p><table><tr><td>&#8226;</td><td>two</td></tr></table>"""
    assert check(page).split("\n\n") == ["FORM 10-K", "# PART I", "## Item 1. Business", "Bold beginning",
                                         "### Competition", "- one\n- two"]


def test_prose_is_given_as_it_is_written():
    grid = "<table><tr><td>a</td><td>1</td></tr><tr><td>b</td><td>2</td></tr></table>"
    text = to_markdown(f"<p>from ____ to ____ 5</p>{grid}<p>Fine 6.</p>").text
    assert text == "from ____ to ____ 5\n\n|  |  |\n|---|---|\n| a | 1 |\n| b | 2 |\n\nFine 6."


@pytest.mark.parametrize("page", [
    "<SEC-DOCUMENT>0000000042-25-000001.txt\n<DOCUMENT>\n<TYPE>10-K\n<TEXT><html><p>1</p></html></TEXT></DOCUMENT>",
    "-----BEGIN PRIVACY-ENHANCED MESSAGE-----\n<html>", '{"json": 1}', "", "only words",
    "<DOCUMENT><TYPE>10-K<TEXT><p>1</p></DOCUMENT>\n<document><TYPE>EX-1<TEXT><p>2</p>",
    "<DOCUMENT><TYPE>10-K<TEXT>\n<PAGE>\n<TABLE>\n<S>  <C>\nCash  $ 5\n</TABLE>"])
def test_what_is_no_html_document_is_refused(page):
    with pytest.raises(Unreadable): parse(page)


def words(text: str) -> Counter: return Counter(re.findall(r"[^\W\d_]+", text))


def faithful(path: Path) -> None:
    "A real filing: every word and figure of the body once, nothing hidden, furniture that looks like it."
    root = parse(decode(path.read_bytes()))
    truth, rendered, found = visible_text(root), to_markdown(root), lines(root)
    furniture = "\n".join(rendered.furniture)
    score = fidelity(truth, rendered.text, furniture)
    assert score.kept == score.body > 1000 and score.invented == 0, score
    assert words(rendered.text) + words(furniture) == words(truth)
    assert not (set(words("\n".join(root.itertext()))) - set(words(truth))) & set(words(rendered.text))
    assert signs_joined(root, rendered.text) >= 0.98
    assert max(map(len, rendered.furniture)) < 150
    assert figures(furniture).total() <= 3 * (sum(x.page for x in found) + 1)
    loose = re.compile(r"[$€£)%]|\)%")
    assert not [r for x in found for r in x.rows
                if any(figures(t or "") for t in r[1:]) and any(loose.fullmatch(t or "") for t in r)]


@pytest.mark.parametrize("name, row", [
    ("aapl_2025_10k", "| Net income | $112,010 | $93,736 | $96,995 |"),
    ("amzn_2026_10k", "| Operating income (loss) | $(2,656) | $3,792 | $4,750 |"),
    ("tgt_2026_10k", "| Net other income | (95) | (106) | (92) |")])
def test_every_figure_of_the_quickstart_filings(name, row):
    archive = assets.cache_folder() / "downloads" / assets.ASSETS["filings-10k"].file
    if not archive.is_file(): pytest.skip(f"{archive} is not there")
    path = assets.resolve("package:filings-10k") / f"{name}.html"
    faithful(path)
    assert row in to_markdown(decode(path.read_bytes())).text


def test_every_figure_of_other_filings(dev_data):
    for path in sorted((dev_data / "sec" / "html").glob("*.html")): faithful(path)


MADE = """<html><body><p>a<span style="display:none">1</span>2<sup>3</sup>4</p><div>5<span>6</span></div>7
<br>8
<table><tr><td>9</td><td>10</td></tr><tr><td style="display:none">11</td><td>1<b>2</b></td></tr></table>
<ul><li>13</li><li>14</li></ul><p style="visibility:hidden">15</p><p style="color:white;font-size:3pt">16</p>
<ix:nonFraction name="x">17</ix:nonFraction><div style="display:none"><ix:header>18</ix:header></div>
</body></html>"""


@pytest.mark.browser
@pytest.mark.parity
def test_visible_text_is_what_chromium_shows(tmp_path, dev_data):
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("no Chromium here")
    (tmp_path / "made.html").write_text(MADE)
    files = [tmp_path / "made.html", *sorted((dev_data / "sec" / "html").glob("*.html"))[:3]]
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for file in files:
            page = browser.new_page()
            page.goto(f"file://{file}", wait_until="domcontentloaded")
            page.evaluate("document.querySelectorAll('sup,sub').forEach(e => { e.before(' '); e.after(' ') })")
            shown = page.evaluate("document.body.innerText")
            assert figures(shown) == figures(visible_text(decode(file.read_bytes()))), file
            page.close()
        browser.close()


@pytest.mark.fault
@pytest.mark.parametrize("page", [
    "<div>" * 100_000 + "1", "<table><tr><td>" * 50_000 + "1", "<p>" + '<span style="padding-left:3pt">' * 5000 + "1",
    "<table><tr>" + "<td colspan=1000>1</td>" * 3000 + "</tr></table>",
    "<table>" + ("<tr>" + "<td rowspan=9999 colspan=1000>1</td>" * 30 + "</tr>") * 60 + "</table>",
    "<p " + " ".join(f"a{n}=1" for n in range(100_000)) + ">1</p>"])
def test_a_page_that_would_hang_a_parser_is_refused(page):
    start = time.process_time()
    with pytest.raises(Unreadable): to_markdown(page)
    assert time.process_time() - start < 20


@pytest.mark.fault
@pytest.mark.parametrize("page", [
    "<p>" + "<?xml " * 1_000_000 + "<p>1", "<p style='" + "font-weight" + " " * 1_000_000 + "'>1</p>", "<p>" + "1 $ " * 1_000_000,
    "<p>" + "<b><i><td><tr>" * 30_000 + "1", "<p>" + "_ " * 1_000_000 + "x", "<p>" + "-" * 1_000_000 + f"x</p>{BREAK}",
    f"<p>(in millions)</p>{BREAK}" * 10_000, "<table><tr><td>a<td>" + "1," * 500_000 + "x!<tr><td>b<td>" + "2023 " * 100_000,
    "<table>" + "<tr><td><td>2023<td>2024<tr><td>a<td>1<td>2" * 5000,
    "<table><tr><td>a<td>1<tr><td>a<td>1</table>" + BREAK * 5000])
def test_a_page_that_would_hang_our_patterns_is_read_in_seconds(page):
    start = time.process_time()
    check(page)
    assert time.process_time() - start < 20


def test_a_page_over_the_limit_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr("domain_adapt.sources.markdown.MAX", 3_000_000)
    with pytest.raises(Unreadable, match="HTML of 4 MB, more than 3"): parse("<p>" + "1" * 4_000_000)


def test_a_table_of_contracts_is_not_cut_at_its_dates():
    rows = [["(4)", "Indentures", ""], ["", "(a)", f"By-laws of 2019, {'as amended ' * 9}"], ["", "(b)", "Notes of 2020"]]
    assert len(tables(rows)) == 1


def test_an_undisplayed_cell_takes_no_column():
    row = "<tr><td>Sales</td><td>{}1</td><td>{}2</td></tr>".format
    head = "<tr><td></td><td colspan=3 style='display:none'></td><td>2025</td><td>2024</td></tr>"
    assert table(f"<table>{head}{row(1, 2)}</table>") == [["", "2025", "2024"], ["Sales", "11", "22"]]


def test_signs_torn_from_their_figure_are_seen():
    root = parse("<table><tr><td>a</td><td>$</td><td>5</td><td>(</td><td>6</td><td>)%</td></tr></table><p>$7</p>")
    assert signs_joined(root, to_markdown(root).text) == 1
    assert signs_joined(root, "| a | $ | 5 | ( | 6 | )% |\n$7") == 0
    assert signs_joined(root, "| a | $5 | ( | 6 | )% |\n$7") == pytest.approx(1 / 3)
