"""Typed filings: paragraphs are joined, tables stay as printed, and no figure is lost or made up."""
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from domain_adapt.sources.markdown import Fidelity, fidelity, figures
from domain_adapt.sources.plain import columned, paragraphs, plain_markdown, printed
from domain_adapt.sources.sgml import submission
from growth import is_linear

markdown = lambda text: plain_markdown(text)[0]
LONG = "The Registrant has duly caused this report to be signed on its behalf by\nthe undersigned thereunto duly authorized, and so on and so forth."
JOINED = LONG.replace("\n", " ")


def test_full_lines_are_joined_and_short_ones_are_not():
    assert markdown(f"     {LONG}\n\nOne CNN Center\nAtlanta, Georgia\n") == f"{JOINED}\n\nOne CNN Center\nAtlanta, Georgia"
    assert markdown("It was signed with Arrow\nby the Company and of the\nCompany.") == "It was signed with Arrow by the Company and of the Company."


@pytest.mark.parametrize("lines, text", [
    (["under the juris-", "diction of it"], "under the jurisdiction of it"),
        (["on Form 10-", "K of a newly-", "formed one"], "on Form 10-K of a newly-formed one"),
    (["the pass-", "through it"], "the pass-through it"), (["in 1994-", "1995 it"], "in 1994-1995 it"),
    (["it is -", "so"], "it is - so")])
def test_hyphens_go_only_where_the_whole_word_is_known(lines, text):
    assert paragraphs(lines, 12, Counter({"jurisdiction": 1, "passthrough": 1, "pass-through": 1})) == [text]


def test_items_of_lists_are_paragraphs_of_their_own():
    text = "(a)  one thing that is\n     long\n(b)  two\n1.1  three\n"
    assert markdown(text) == "(a) one thing that is long\n\n(b) two\n\n1.1 three"
    assert markdown("o    red\n\no    blue\n\n-- green") == "- red\n- blue\n- green"
    name = "and then it was agreed with others of the kind and by both Asta Funding\nInc. and the Company."
    assert markdown(f"{LONG}\n\n{name}") == f"{JOINED}\n\n{name}".replace("Funding\n", "Funding ")


TABLE = "<TABLE>\n<CAPTION>\n                 1995     1994\n                 ----     ----\n<S>              <C>      <C>\nSales <F1>..... $  15    $  14\n  Costs\t\t   (7)      (6)\n\n<FN>\n<F1> Net of 2% tax.\n</TABLE>\n"


def test_tables_keep_every_column():
    assert markdown(TABLE) == """```
                 1995     1994
                 ----     ----

Sales [F1]..... $  15    $  14
  Costs            (7)      (6)

[F1] Net of 2% tax.
```"""
    assert markdown("    Delaware        1-6991\n    (State)         (Number)") == "```\nDelaware        1-6991\n(State)         (Number)\n```"
    assert markdown("<TABLE>\nA ``` B\n</TABLE>") == "```\nA ''' B\n```"


@pytest.mark.parametrize("line, columns", [
    ("Sales        15", True), ("Sales.......15", True), ("Sales . . . . . 15", True), ("Sales  15", False),
        ("(a)      words", False),
    ("ITEM 5.     Other Events", False), ("By:      /s/ Doe", True), ("    indented", False),
    ("the  terms   of  this  old   agreement", False),
    ("Costs of the sales  of  it   15   14   13", True)])
def test_columns_are_known_by_their_gaps(line, columns): assert columned([line]) == [columns]


def test_a_hanging_paragraph_is_no_table():
    assert markdown("99(a) --   Audited consolidated balance\n           sheets as of December") == "99(a) -- Audited consolidated balance sheets as of December"
    assert markdown("2.1  Benefit.  The Bank shall pay\n     --------   it until age 61.") == "2.1 Benefit. The Bank shall pay it until age 61."


def test_a_table_below_prose_in_one_block_is_set_apart():
    text = f"{LONG}\n{LONG}\n               2001     2000\nSales            15       14\n"
    assert markdown(text).endswith("so forth.\n\n```\n               2001     2000\nSales            15       14\n```")


def test_headings():
    text = f"PART I\n\nITEM 5.  Other\n         Events\n- --------------\n\n{LONG}\n\nRISK FACTORS\n\n{LONG}\n\nERNST & YOUNG\n\nNew York"
    assert markdown(text) == f"# PART I\n\n## ITEM 5. Other Events\n\n{JOINED}\n\n### RISK FACTORS\n\n{JOINED}\n\nERNST & YOUNG\n\nNew York"


@pytest.mark.parametrize("line, heading", [("Item 5. Other Events", True), ("ITEM 7A", True), ("Item 2.02 Results", True),
    ("Part II", True), ("PART I - FINANCIAL INFORMATION", True), ("Item 3 of the report says so.", False),
    ("Part II is incorporated by reference.", False), ("Items of note", False), ("In part I", False)])
def test_only_what_names_a_part_or_item_is_its_heading(line, heading):
    assert markdown(line).startswith("#") == heading


def test_page_furniture_goes_and_the_text_flows_over_it():
    page = "                    {0}\n<PAGE>   {1}\nACME CORP Annual Report\n\n"
    text, furniture = plain_markdown("and what is to be\n\n" + "".join(f"{page.format(n, n + 1)}words of the year {1990 + n} that go\n\n" for n in range(1, 6)))
    assert text == "and what is to be " + " ".join(f"words of the year {1990 + n} that go" for n in range(1, 6))
    assert Counter(furniture) == Counter(["1", "2", "2", "3", "3", "4", "4", "5", "5",
        "6"] + ["ACME CORP Annual Report"] * 5)


@pytest.mark.parametrize("number", ["2", "- 2 -", "-2-", "ii", "-ii-", "Page 2 of 10", "PAGE 2", "F-2"])
def test_page_numbers_go_only_at_the_end_of_a_page(number):
    assert plain_markdown(f"Some words.\n\n{number}\n<PAGE>\n\nAnd more.") == ("Some words.\n\nAnd more.",
        [number])
    assert number in markdown(f"Some words.\n\n{number}\n\nAnd more.")
    assert plain_markdown(f"Some words.\n\n{number}\n\fAnd more.") == ("Some words.\n\nAnd more.", [number])


def test_tables_go_on_over_pages():
    text = "<TABLE>\nA      1\n                  7\n<PAGE>\nB      2\n</TABLE>"
    assert markdown(text.replace("                  7\n", "\n   7\n\n")) == "```\nA      1\n\nB      2\n```"


def test_labels_in_tags_entities_and_stray_bytes():
    assert markdown("<TABLE> <S> <C>\n<CASH>                     53,000\n</TABLE>").split() == ["```", "CASH",
        "53,000", "```"]
    assert printed("AT&amp;T &#150; R&D&reg; &bogus;\x00\x1a") == "AT&T – R&D® &bogus;"
    assert printed("- - ----\n- -5\n-6") == "----\n-5\n-6" and printed("a\r\nb\rc\td") == "a\nb\nc       d"


words = st.text("abcDEF.,-($)%", min_size=1, max_size=9)
number = st.one_of(st.integers(0, 10**7).map("{:,}".format), st.decimals(0, 99, places=2).map(str),
    st.integers(0, 99).map("({})".format))
cells = st.lists(st.one_of(words, number), min_size=1, max_size=9)
gaps = st.sampled_from([" ", " ", "  ", "   ", "      ", " ..... ", "\t"])
line = st.tuples(st.integers(0, 40), cells, gaps).map(lambda x: " " * x[0] + x[2].join(x[1]))
special = st.sampled_from(["", "", "<PAGE>", "<PAGE>   7", "   7", "<TABLE>", "</TABLE>", "<S>   <C>",
    "<CAPTION>", "-----", "- -----", "\f", "ITEM 5.  Events", "(a)  x 5"])


@given(st.lists(st.one_of(line, special), max_size=40), st.sampled_from(["\n", "\r\n", "\r"]))
@settings(deadline=None, max_examples=300)
def test_no_figure_is_lost_or_made_up(lines, eol):
    text, furniture = plain_markdown(eol.join(lines))
    truth = re.sub(r"</?(?:PAGE|TABLE|CAPTION|S|C|FN)>", " ", "\n".join(lines))
    body = figures(truth) - figures("\n".join(furniture))
    assert fidelity(truth, text, "\n".join(furniture)) == Fidelity(body.total(), body.total(), 0)
    assert figures(text) + figures("\n".join(furniture)) == figures(truth)


def test_no_figure_of_real_typed_filings_is_lost_or_made_up(dev_data):
    total = 0
    for path in sorted((dev_data / "sec" / "submissions").glob("*.txt")):
        for _, part in submission(path.read_bytes()):
            page = part.body().decode("cp1252")
            if re.search(r"<html|<x|<ownership|begin 6|\{\"|<div|function|\.report", page[:3000], re.I): continue
            text, furniture = plain_markdown(page)
            truth = re.sub(r"</?(?:PAGE|TABLE|CAPTION|S|C|FN)>", " ", page, flags=re.I)
            total += (fid := fidelity(truth, text, "\n".join(furniture))).body
            assert (fid.kept, fid.invented) == (fid.body, 0), (path.name, part.head)
    assert total > 100_000


@pytest.mark.fault
@pytest.mark.parametrize("piece", [" ", "a", "a   ", "-", "- ", "<", "&", "<PAGE>", "<PAGE>\n2\n",
    "x\n<PAGE>\n", "I\n<PAGE>\na\n", "a   5\n<PAGE>\n", "<TABLE>", ".",
                                   " .", "\n", "a-\n", "a\n", "\t", "\f", "   1", " 1,", "(a) \n",
                                   "a   b\n\n", "A\n\n", "<A>\n", "- - ", "``` ", "</A>  \n"])
def test_hostile_repetition_is_read_in_linear_time(piece):
    assert is_linear(lambda n: plain_markdown(piece * (n // len(piece))), 30_000)
