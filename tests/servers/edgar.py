"""A web server that lays filings out as EDGAR does, keeps its rules, and misbehaves where it is told to."""
import gzip
import json
import re
import time

from servers import web

HEADING = """Description:           Master Index of EDGAR Dissemination Feed
Last Data Received:    March 31, 2024
Comments:              webmaster@sec.gov
Anonymous FTP:         ftp://ftp.sec.gov/edgar/
Cloud HTTP:            https://www.sec.gov/Archives/

 
 
 
CIK|Company Name|Form Type|Date Filed|Filename
--------------------------------------------------------------------------------
"""
BLOCKED = """<!DOCTYPE html>
<html lang="en"><head><title>SEC.gov | Your Request Originates from an Undeclared Automated Tool</title></head>
<body><h1>Your Request Originates from an Undeclared Automated Tool</h1></body></html>"""
ABSENT = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
COLUMNS = {"accessionNumber": "accession", "filingDate": "filed", "form": "form"}


def submission(cik: int, form: str, filed: str, accession: str, words: int = 200) -> bytes:
    "A full submission as text."
    day = filed.replace("-", "")
    return (f"<SEC-DOCUMENT>{accession}.txt : {day}\n<SEC-HEADER>{accession}.hdr.sgml : {day}\nACCESSION NUMBER:\t\t{accession}\n"
            f"CONFORMED SUBMISSION TYPE:\t{form}\nFILED AS OF DATE:\t\t{day}\n\tCENTRAL INDEX KEY:\t\t{cik:010}\n</SEC-HEADER>\n"
            f"<DOCUMENT>\n<TYPE>{form}\n<TEXT>\n{'word ' * words}\n</TEXT>\n</DOCUMENT>\n</SEC-DOCUMENT>\n").encode()


def columns(rows: list[dict]) -> dict:
    return {name: [r[key] for r in rows] for name, key in COLUMNS.items()}


class Edgar(web.Server):
    """`companies` is {cik: (name, ticker, [(form, filed, accession), ...])}. `files` maps paths to bytes, `faults` paths
    to what is done instead, one a request: a status with headers, "drop", "cut" or "page". `log` holds (time, path, agent)."""

    def __init__(self, companies: dict, recent: int = 1000, words: int = 200):
        super().__init__(Handler)
        self.files, self.faults, self.log, self.pause = {}, {}, [], 0.0
        self.base_url = self.address
        self._lay_out(companies, recent, words)

    def _lay_out(self, companies: dict, recent: int, words: int) -> None:
        put = lambda path, data: self.files.__setitem__(path, data if isinstance(data, bytes) else json.dumps(data).encode())
        quarters = {}
        for cik, (name, _, filings) in companies.items():
            rows = [dict(zip(("form", "filed", "accession"), f)) for f in filings]
            for r in rows:
                put(f"/Archives/edgar/data/{cik}/{r['accession']}.txt", submission(cik, r["form"], r["filed"], r["accession"], words))
                quarter = f"{r['filed'][:4]}/QTR{(int(r['filed'][5:7]) + 2) // 3}"
                quarters.setdefault(quarter, []).append(
                    f"{cik}|{name}|{r['form']}|{r['filed']}|edgar/data/{cik}/{r['accession']}.txt\n")
            self._company(put, cik, name, sorted(rows, key=lambda r: r["filed"], reverse=True), recent)
        for quarter, lines in quarters.items(): self.index(quarter, lines)
        put("/files/company_tickers.json", {str(n): dict(cik_str=cik, ticker=ticker, title=name)
                                            for n, (cik, (name, ticker, _)) in enumerate(companies.items()) if ticker})

    def _company(self, put, cik: int, name: str, rows: list[dict], recent: int) -> None:
        older = [rows[i:i + recent] for i in range(recent, len(rows), recent)]
        named = [dict(name=f"CIK{cik:010}-submissions-{n:03}.json", filingCount=len(part), filingFrom=part[-1]["filed"],
                      filingTo=part[0]["filed"]) for n, part in enumerate(older, 1)]
        put(f"/submissions/CIK{cik:010}.json", dict(cik=f"{cik:010}", name=name, filings=dict(recent=columns(rows[:recent]),
                                                                                              files=named)))
        for file, part in zip(named, older): put(f"/submissions/{file['name']}", columns(part))

    def index(self, quarter: str, lines: list[str]) -> None:
        "Write the index of a quarter such as 2024/QTR1."
        at, data = f"/Archives/edgar/full-index/{quarter}/master", (HEADING + "".join(lines)).encode()
        self.files[f"{at}.idx"], self.files[f"{at}.gz"] = data, gzip.compress(data)

    def asked(self, part: str = "/Archives/edgar/data/") -> list[str]:
        "Paths asked for that hold `part`."
        return [path for _, path, _ in self.log if part in path]

    def handle_error(self, *_): pass


class Handler(web.Handler):
    def do_GET(self):
        agent = self.headers.get("User-Agent", "")
        self.server.log.append((time.monotonic(), self.path, agent))
        fault = self.server.faults[self.path].pop(0) if self.server.faults.get(self.path) else None
        data = self.server.files.get(self.path)
        if not re.search(r"\S+@\S+\.\S+", agent): self.answer(403, BLOCKED.encode(), {"Content-Type": "text/html"})
        elif isinstance(fault, tuple): self.answer(fault[0], b"not now", fault[1])
        elif fault == "drop": self.close_connection = True
        elif fault == "page": self.answer(200, BLOCKED.encode(), {})
        elif data is None: self.answer(403 if "index" in self.path else 404, ABSENT, {"Content-Type": "application/xml"})
        else: self.answer(200, data, {}, cut=fault == "cut")

    def answer(self, status: int, data: bytes, headers: dict, cut: bool = False) -> None:
        self.head(status, len(data), headers)
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if self.server.pause and status == 200: time.sleep(self.server.pause)
        if cut: self.close_connection = True
        else: self.wfile.write(data[half:])
