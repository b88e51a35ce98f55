"""EDGAR over HTTP: every way to ask, its rules kept, and what has arrived kept whatever happens."""
import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate

import httpx
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from servers.edgar import Edgar as Server

from domain_adapt.params import Edgar, UserError
from domain_adapt.sources import edgar
from domain_adapt.sources.edgar import Pace, fetch, listing, quarters_between, read_index

KEY, AGENT = "corpora.sec.edgar", "Example Ltd jo@example.org"
COMPANIES = {
    320193: ("Apple Inc.", "AAPL", [
        ("10-K", "2023-11-03", "0000320193-23-000106"), ("10-Q", "2024-02-02", "0000320193-24-000006"),
        ("10-K405", "2000-12-14", "0000912057-00-053623"), ("8-K", "2024-02-01", "0000320193-24-000005")]),
    1067983: ("BERKSHIRE HATHAWAY INC", "BRK-B", [
        ("10-K", "2024-02-26", "0000950170-24-019719"), ("10-K/A", "2024-03-01", "0000950170-24-020000")]),
    9999: ("GONE | CO /DE/", "", [("10-K", "1996-03-29", "0000009999-96-000001")])}


@pytest.fixture
def server():
    with Server(COMPANIES, recent=2) as s: yield s


def get(server, folder, rate=1000, **query):
    return fetch(Edgar(user_agent=AGENT, base_url=server.base_url, **query), folder, KEY, rate=rate, wait=0.01)


def archive(path): return f"/Archives/edgar/data/{path}"


ALL = {a: (str(c), f, d) for c, (_, _, filings) in COMPANIES.items() for f, d, a in filings}


@pytest.mark.parametrize("query, accessions", [
    (dict(tickers=["aapl"]), ["0000320193-24-000006", "0000320193-24-000005", "0000320193-23-000106", "0000912057-00-053623"]),
    (dict(tickers=["BRK.B"], forms=["10-K"]), ["0000950170-24-019719"]),
    (dict(ciks=[320193], tickers=["AAPL"], forms=["10-k*"]), ["0000320193-23-000106", "0000912057-00-053623"]),
    (dict(ciks=["CIK0000009999", "0001067983"], forms=["10-K", "10-K/A"]),
        ["0000950170-24-020000", "0000950170-24-019719", "0000009999-96-000001"]),
    (dict(ciks=[320193], since="2023-11-03", until="2024-02-01"), ["0000320193-24-000005", "0000320193-23-000106"]),
    (dict(quarters=["2024Q1"], forms=["10-K*"]), ["0000950170-24-020000", "0000950170-24-019719"]),
    (dict(quarters=["2024Q1", "1996Q1"], ciks=[9999, 320193]),
        ["0000320193-24-000006", "0000320193-24-000005", "0000009999-96-000001"]),
    (dict(since="2023-11-03", until="2024-02-02", forms=["10-[KQ]"]), ["0000320193-24-000006", "0000320193-23-000106"]),
    (dict(quarters=["2024Q1"], limit=2), ["0000950170-24-020000", "0000950170-24-019719"])])
def test_every_way_to_ask(server, tmp_path, query, accessions):
    table = get(server, tmp_path, **query)
    assert list(table.accession) == accessions and set(table.status) == {"fetched"}
    assert [tuple(r) for r in table[["cik", "form", "filed"]].itertuples(index=False)] == [ALL[a] for a in accessions]
    for path in table.path: assert (tmp_path / path).read_bytes() == server.files[archive(path)]
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*.txt")} == set(table.path)
    assert {agent for _, _, agent in server.log} == {AGENT}


def test_the_listing_says_what_the_table_does(server, tmp_path):
    table = get(server, tmp_path, quarters=["1996Q1"])
    at = listing(Edgar(user_agent="another x@y.org", quarters=["1996Q1"]), tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(at, dtype=str, keep_default_na=False), table, check_dtype=False)
    assert list(table.columns) == "cik company form filed accession path status reason".split()
    assert table.company[0] == "GONE | CO /DE/"


def test_what_is_here_is_not_asked_for_again(server, tmp_path):
    get(server, tmp_path, ciks=[320193], forms=["10-K"])
    server.log.clear()
    again = get(server, tmp_path, ciks=[320193], forms=["10-*"])
    assert list(again.status) == ["fetched", "here", "fetched"] and len(server.asked()) == 2
    get(server, tmp_path, quarters=["2023Q4"])
    server.log.clear()
    get(server, tmp_path, quarters=["2023Q4"])
    assert server.log == []    # an index of a quarter that is over is kept as well


def test_older_pages_are_read_only_for_their_dates(server, tmp_path):
    get(server, tmp_path, ciks=[320193], since="2024-01-01")
    assert not server.asked("submissions-001")
    get(server, tmp_path, ciks=[320193], until="2001-01-01")
    assert server.asked("submissions-001")


@pytest.mark.parametrize("asked", [10, 25])
def test_no_second_holds_more_requests_than_allowed(server, tmp_path, asked):
    filings = [("8-K", "2024-01-02", f"0000000001-24-{n:06}") for n in range(3 * asked)]
    with Server({1: ("A", "A", filings)}) as server:
        server.pause = 0.01
        get(server, tmp_path, rate=asked, ciks=[1])
        times = [t for t, _, _ in server.log]
    assert len(times) == 3 * asked + 1 and times[-1] - times[0] < 4.5
    assert max(sum(t <= u < t + 1 for u in times) for t in times) <= asked


def test_the_rate_is_ten_by_default():
    assert edgar.Site(Edgar(user_agent=AGENT, ciks=[1]), KEY).pace.gap == 0.1


def test_addresses_of_the_sec():
    site = edgar.Site(Edgar(user_agent=AGENT, ciks=[1]), KEY)
    assert site.url("submissions/CIK0000000001.json") == "https://data.sec.gov/submissions/CIK0000000001.json"
    assert site.url("files/company_tickers.json") == "https://www.sec.gov/files/company_tickers.json"


# --- what goes wrong ---

KTEN = "320193/0000320193-23-000106.txt"


@pytest.mark.fault
@pytest.mark.parametrize("faults", [[(429, {})], [(503, {}), (500, {})], ["drop"], ["cut", "cut"], ["page"],
                                    ["drop", (502, {}), "cut", (429, {"Retry-After": "soon"})]])
def test_what_passes_is_tried_again(server, tmp_path, faults):
    server.faults[archive(KTEN)] = list(faults)
    table = get(server, tmp_path, ciks=[320193], forms=["10-K"])
    assert list(table.status) == ["fetched"] and len(server.asked()) == len(faults) + 1
    assert (tmp_path / KTEN).read_bytes() == server.files[archive(KTEN)]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.fault
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_the_server_says_how_long_all_shall_wait(server, tmp_path, status, kind):
    value = "1" if kind == "seconds" else formatdate(time.time() + 3, usegmt=True)
    server.faults[archive(KTEN)] = [(status, {"Retry-After": value})]
    get(server, tmp_path, ciks=[320193, 1067983, 9999])
    first = next(t for t, path, _ in server.log if path == archive(KTEN))
    waited = [t - first for t, _, _ in server.log if t > first]
    assert waited and (1 if kind == "seconds" else 1.5) <= min(waited) < 4


@pytest.mark.fault
def test_waits_grow(server, tmp_path):
    server.faults[archive(KTEN)] = [(503, {})] * 5
    get(server, tmp_path, ciks=[320193], forms=["10-K"])
    times = [t for t, path, _ in server.log if path == archive(KTEN)]
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert all(gap >= 0.01 * 2**n for n, gap in enumerate(gaps)) and sum(gaps) < 3


@pytest.mark.fault
@pytest.mark.parametrize("faults, status, reason, asked", [([(404, {})], "missing", "HTTP 404", 1),
    ([(503, {})] * 8, "failed", "HTTP 503", 8), (["cut"] * 8, "failed", "RemoteProtocolError: peer closed", 8),
    (["page"] * 8, "failed", "a web page came", 8)])
def test_a_filing_that_cannot_be_had_stops_no_other(server, tmp_path, faults, status, reason, asked):
    server.faults[archive(KTEN)] = list(faults)
    table = get(server, tmp_path, ciks=[320193]).set_index("accession")
    bad = table.loc["0000320193-23-000106"]
    assert (bad.status, bad.path) == (status, "") and bad.reason.startswith(reason)
    assert sorted(table.status)[1:] == ["fetched"] * 3 or sorted(table.status)[:3] == ["fetched"] * 3
    assert server.asked().count(archive(KTEN)) == asked and not (tmp_path / KTEN).exists()
    assert not list(tmp_path.rglob("*.part"))
    if not server.faults[archive(KTEN)]:    # and the next run gets it
        assert set(get(server, tmp_path, ciks=[320193]).status) == {"here", "fetched"}


@pytest.mark.fault
def test_an_outage_ends_the_fetch_and_says_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr(edgar, "PATIENCE", 3)
    for path in server.files: server.faults[path] = [(503, {})] * 99 if "/data/" in path else []
    with pytest.raises(UserError, match=rf"{KEY}: 3 filings in a row could not be fetched \(HTTP 503\)"):
        get(server, tmp_path, ciks=[320193])
    with pytest.raises(UserError, match="none of 1 filings could be fetched: HTTP 503"): get(server, tmp_path, ciks=[9999])


@pytest.mark.fault
def test_who_is_blocked_is_told_what_to_do(server, tmp_path):
    nobody = Edgar(user_agent=AGENT, ciks=[9999], base_url=server.base_url).model_copy(update=dict(user_agent="curl/8"))
    with pytest.raises(UserError) as e: fetch(nobody, tmp_path, KEY, wait=0.01)
    for words in (f"{KEY}.user_agent", "HTTP 403", "Undeclared Automated Tool", "e-mail", "'curl/8'", "ten minutes"):
        assert words in str(e.value)
    assert len(server.log) == 1


@pytest.mark.fault
def test_a_block_in_mid_fetch_ends_it_at_once(tmp_path):
    filings = [("8-K", "2024-01-02", f"0000000001-24-{n:06}") for n in range(200)]
    with Server({1: ("A", "A", filings)}) as server:
        server.faults[archive("1/0000000001-24-000150.txt")] = [(403, {})]
        with pytest.raises(UserError, match="HTTP 403"): get(server, tmp_path, ciks=[1])
        assert 45 < len(server.asked()) < 70
        server.log.clear()
        table = get(server, tmp_path, ciks=[1])
        assert len(table) == 200 and len(server.asked()) == sum(table.status == "fetched") < 160


@pytest.mark.fault
def test_who_waits_does_not_hold_up_the_end(server, tmp_path):
    server.faults[archive("320193/0000320193-24-000006.txt")] = [(503, {})]    # the newest, so asked for first
    server.faults[archive(KTEN)] = [(403, {})]
    query, started = Edgar(user_agent=AGENT, base_url=server.base_url, ciks=[320193]), time.monotonic()
    with pytest.raises(UserError, match="HTTP 403"): fetch(query, tmp_path, KEY, rate=1000, wait=60)
    assert time.monotonic() - started < 10


@pytest.mark.fault
def test_too_long_a_wait_is_the_users_to_wait(server, tmp_path):
    server.faults[archive(KTEN)] = [(429, {"Retry-After": "86400"})]
    with pytest.raises(UserError, match="come back in 86400 seconds"): get(server, tmp_path, ciks=[320193])


@pytest.mark.fault
@pytest.mark.parametrize("query, key, words", [
    (dict(tickers=["AAPL", "XXXX", "YYYY"]), "tickers", "knows no XXXX, YYYY"),
    (dict(ciks=[5]), "ciks", "CIK0000000005.json"), (dict(quarters=["2011Q2"]), "quarters", "2011/QTR2/master.gz"),
    (dict(ciks=[9999], forms=["20-F"]), "", "no such filing for ciks: \\[9999\\], forms: \\['20-F'\\]")])
def test_what_edgar_does_not_have_is_named(server, tmp_path, query, key, words):
    with pytest.raises(UserError, match=rf"{KEY}{'.' if key else ''}{key}: .*{words}"): get(server, tmp_path, **query)


@pytest.mark.fault
@pytest.mark.parametrize("path, data, query", [
    ("/files/company_tickers.json", b"<html>", dict(tickers=["AAPL"])), ("/files/company_tickers.json", b"[]", dict(tickers=["A"])),
    ("/submissions/CIK0000009999.json", b'{"filings": 5}', dict(ciks=[9999])),
    ("/submissions/CIK0000009999.json", b'{"name": "X", "filings": {"recent": {"form": ["a"], "filingDate": [], '
        b'"accessionNumber": []}, "files": []}}', dict(ciks=[9999])),
    ("/Archives/edgar/full-index/1996/QTR1/master.gz", b"<html>", dict(quarters=["1996Q1"])),
    ("/Archives/edgar/full-index/1996/QTR1/master.gz", b"\x1f\x8bbroken", dict(quarters=["1996Q1"]))])
def test_lists_of_another_make_are_errors(server, tmp_path, path, data, query):
    server.files[path] = data
    with pytest.raises(UserError, match=f"{KEY}.{next(iter(query))}: http"): get(server, tmp_path, **query)
    assert not list(tmp_path.rglob("*.idx"))


@pytest.mark.fault
def test_hostile_names_lead_nowhere_and_are_counted(server, tmp_path):
    bad = ["../../../etc/passwd", "0000009999-96-000001/../x", "0000009999-96-00000１", "", None, "0000009999-96-000001\n"]
    good = "0000009999-96-000002"
    server.files[archive(f"9999/{good}.txt")] = b"<SEC-DOCUMENT>"
    table = dict(form=["10-K"] * 7, filingDate=["1996-03-29"] * 7, accessionNumber=[*bad, good])
    older = [dict(name="../../CIK0000009999-submissions-001.json", filingFrom="1990-01-01", filingTo="1996-01-01")]
    server.files["/submissions/CIK0000009999.json"] = json.dumps(dict(name="../X", filings=dict(recent=table, files=older))).encode()
    found = get(server, tmp_path / "a" / "b", ciks=[9999])
    assert list(found.status) == ["fetched"] + ["malformed"] * 7 and found.path[0] == f"9999/{good}.txt"
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".txt"] == [tmp_path / "a/b/9999" / f"{good}.txt"]


@pytest.mark.fault
def test_lines_of_an_index_that_are_none_are_counted(server, tmp_path):
    good = "9999|CAFÉ|10-K|1996-03-29|edgar/data/9999/0000009999-96-000001.txt\r\n"
    bad = ["torn|line\n", "9999|X|10-K|1996-03-29|edgar/data/9999/../../../x.txt\n", "9999|X|10-K|19960329|" + good.split("|")[4],
           "99 99|X|10-K|1996-03-29|" + good.split("|")[4], "9999|X|10-K|1996-03-29|http://evil/0000009999-96-000001.txt\n"]
    server.index("1996/QTR1", [bad[0], good, "\n", *bad[1:]])
    table = get(server, tmp_path, quarters=["1996Q1"])
    assert list(table.status) == ["fetched"] + ["malformed"] * 5
    assert table.company[0] == "CAFÉ" and "1996Q1, line 12: 'torn|line'" in set(table.reason)


def test_a_filing_of_several_companies_is_fetched_once(server, tmp_path):
    line = "{}|{}|10-K|2024-02-14|edgar/data/{}/0000000007-24-000001.txt\n"
    server.index("2024/QTR1", [line.format(c, f"DUKE {c}", c) for c in (7, 8, 9)])
    server.files[archive("9/0000000007-24-000001.txt")] = b"<SEC-DOCUMENT>"
    table = get(server, tmp_path, quarters=["2024Q1"])
    assert list(table.cik) == ["9", "8", "7"] and set(table.path) == {"9/0000000007-24-000001.txt"}
    assert list(table.status) == ["fetched", "filed together", "filed together"] and len(server.asked()) == 1


@pytest.mark.fault
def test_killed_in_mid_fetch_it_goes_on_where_it_was(tmp_path):
    filings = [("8-K", "2024-01-02", f"0000000001-24-{n:06}") for n in range(40)]
    with Server({1: ("A", "A", filings)}, words=100_000) as server:
        server.pause = 0.15
        code = ("from domain_adapt.params import Edgar; from domain_adapt.sources.edgar import *; import sys\n"
                f"fetch(Edgar(user_agent={AGENT!r}, ciks=[1], base_url=sys.argv[1]), sys.argv[2], 'k', rate=1000)")
        child = subprocess.Popen([sys.executable, "-c", code, server.base_url, str(tmp_path)], stderr=subprocess.DEVNULL)
        while len(whole := list(tmp_path.glob("1/*.txt"))) < 8 and child.poll() is None: time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        whole = list(tmp_path.glob("1/*.txt"))
        assert 8 <= len(whole) < 40 and list(tmp_path.glob("1/.*.part"))
        for path in whole: assert path.read_bytes() == server.files[archive(f"1/{path.name}")]
        server.log.clear()
        server.pause = 0
        table = get(server, tmp_path, ciks=[1])
        assert len(server.asked()) == len(set(server.asked())) == 40 - len(whole)
        assert sorted(set(table.status)) == ["fetched", "here"] and len(list(tmp_path.glob("1/*.txt"))) == 40
        assert not list(tmp_path.rglob("*.part"))


@pytest.mark.fault
def test_two_fetches_do_not_share_a_folder(server, tmp_path):
    with edgar.locked(tmp_path / ".lock", "x"), pytest.raises(UserError, match="another process"):
        get(server, tmp_path, ciks=[9999])


def test_without_a_network(server, tmp_path, monkeypatch):
    table = get(server, tmp_path, ciks=[9999])
    server.log.clear()
    monkeypatch.setenv("DOMAIN_ADAPT_OFFLINE", "1")
    assert get(server, tmp_path, ciks=[9999]).path.tolist() == table.path.tolist() and not server.log
    with pytest.raises(UserError, match=rf"{KEY}: .* DOMAIN_ADAPT_OFFLINE=1"): get(server, tmp_path, ciks=[320193])
    (tmp_path / table.path[0]).unlink()
    with pytest.raises(UserError, match="1 filings .* are gone"): get(server, tmp_path, ciks=[9999])


def test_no_server_at_all(tmp_path):
    query = Edgar(user_agent=AGENT, ciks=[1], base_url="http://127.0.0.1:1")
    with pytest.raises(UserError, match=f"{KEY}.ciks: http://127.0.0.1:1/.*ConnectError"): fetch(query, tmp_path, KEY, wait=0.001)


# --- what is asked for ---

@pytest.mark.parametrize("given, words", [
    (dict(user_agent="Example Ltd"), "e-mail address"), (dict(user_agent="a\nb jo@example.org"), "e-mail"),
    (dict(user_agent="Café jo@example.org"), "ASCII"), (dict(ciks=[]), "says no filings"), (dict(ciks=[0]), "greater than 0"),
    (dict(ciks=["Apple"]), "valid integer"), (dict(quarters=["2024"]), "pattern"), (dict(since="2024-02-30"), "should be a day"),
    (dict(since="2024-02-01", until="2024-01-01"), "since is after until"), (dict(limit=0), "greater than 0"),
    (dict(base_url="ftp://x"), "pattern"), (dict(form=["10-K"]), "Extra inputs")])
def test_params_that_cannot_be(given, words):
    with pytest.raises(ValidationError, match=words): Edgar(**{"user_agent": AGENT, "ciks": [1], **given})


def test_days_as_yaml_reads_them():
    import datetime
    assert Edgar(user_agent=AGENT, since=datetime.date(2024, 1, 2)).since == "2024-01-02"


@settings(max_examples=100, deadline=None)
@given(st.dates(pd.Timestamp("1993-01-01").date(), pd.Timestamp("2030-01-01").date()), st.integers(0, 2000))
def test_every_day_is_in_one_of_the_quarters_between(day, days):
    end = day + pd.Timedelta(days=days).to_pytimedelta()
    expected = pd.period_range(pd.Period(day, "Q"), pd.Period(end, "Q"), freq="Q").astype(str).tolist()
    assert quarters_between(day.isoformat(), end.isoformat()) == expected


HEAD = b"CIK|Company Name|Form Type|Date Filed|Filename\n"


@settings(max_examples=200, deadline=1000)
@given(st.lists(st.binary(max_size=60).filter(lambda b: b"\n" not in b), max_size=20))
def test_any_bytes_of_an_index_give_a_row_a_line(lines):
    found = list(read_index(HEAD + b"\n".join(lines), "q"))
    assert len(found) == sum(bool(x.strip()) and not x.startswith(b"-----") for x in lines)
    assert {f.status for f in found} <= {"malformed"}


@pytest.mark.fault
def test_an_index_of_bars_comes_to_an_end():
    start = time.process_time()
    assert len(list(read_index(HEAD + b"|" * 1_000_000 + b"\n" + b"1|" * 500_000 + b"edgar/data/" * 100_000, "q"))) == 2
    assert time.process_time() - start < 20


def test_a_pace_holds_among_threads():
    from concurrent.futures import ThreadPoolExecutor
    pace, times = Pace(200), []

    def ask(_):
        with pace.turn(): times.append(time.monotonic())
    with ThreadPoolExecutor(8) as pool: list(pool.map(ask, range(40)))
    assert min(b - a for a, b in zip(times, times[1:])) >= 1 / 200


def test_redirects_are_not_followed_to_who_knows_where(server, tmp_path):
    server.faults[archive(KTEN)] = [(302, {"Location": "http://127.0.0.1:1/x"})]
    table = get(server, tmp_path, ciks=[320193]).set_index("accession")
    assert table.loc["0000320193-23-000106"].reason == "HTTP 302"
    assert httpx.Client().follow_redirects is False
