"""The report as a browser sees it: opened from disk, both themes, a desk and a phone."""
import contextlib
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

import made_run

pytestmark = pytest.mark.browser
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chromium():
    path = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))),
                None)
    if not path: pytest.skip("Chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = FLAGS + ["--no-sandbox"] * (os.geteuid() == 0)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["tiny", "made"])
def site(request) -> Path:
    "The tiny run's report as the pipeline made it, and one of an invented run with hostile text in it."
    if request.param == "made": return made_run.site()
    return request.getfixturevalue("tiny_run") / "tiny" / "6_report"


@contextlib.contextmanager
def opened(browser, page: Path, size: str = "desk", theme: str = "light", late: int = 50):
    "A page opened from disk and listened to for so many milliseconds more; at the end it must have said nothing wrong and asked nobody."
    width, height = SIZES[size]
    context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=theme)
    tab, wrong, asked = context.new_page(), [], []
    tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("dialog", lambda d: (wrong.append(f"a dialog: {d.message}"), d.dismiss()))
    tab.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
    tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or asked.append(r.url))
    tab.goto(page.as_uri())
    tab.evaluate(f"document.fonts.ready.then(() => new Promise(done => setTimeout(done, {late})))")
    yield tab
    context.close()
    assert not wrong and not asked


def page_names() -> list[str]:
    return ["index", "results", "claims", "1_ingest", "2_tokens", "3_train", "4_merge", "5_evaluate", "lineage", "cost", "library/index",
            "library/40_stats", "search"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", page_names())
def test_a_page_says_nothing_wrong_and_fits(chromium, site, name, size):
    with opened(chromium, site / f"{name}.html", size, late=500) as tab:
        assert "owned" not in tab.title()
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= SIZES[size][0]
        over = tab.evaluate("""() => [...document.querySelectorAll('article *')].filter(e => {
            const r = e.getBoundingClientRect();
            return r.width && r.right > innerWidth + 1 && !e.closest('.rows, .cell_output, pre, .headerlink');
        }).map(e => e.tagName + '.' + e.className)""")
        assert not over


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["index", "results", "1_ingest", "3_train", "5_evaluate"])
def test_every_figure_is_drawn(chromium, site, name, size):
    with opened(chromium, site / f"{name}.html", size) as tab:
        figures = tab.evaluate("""() => [...document.querySelectorAll('figure.plate')].map(f => {
            const seen = [...f.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 200);
            const count = tag => seen[0]?.querySelectorAll(tag).length;
            return [seen.length, count('path'), count('text'), seen[0]?.getBoundingClientRect().height];
        })""")
        assert len(figures) >= {"index": 2, "results": 9}.get(name, 1)
        for count, paths, texts, height in figures:
            assert count == 1 and paths > 2 and texts > 3 and height > 60
        assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0)")


def contrast(tab, selector: str) -> float:
    "WCAG contrast of the first element's text colour (or fill) against the page."
    return tab.evaluate("""s => {
        const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = c => rgb(c).map(x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
                                 .reduce((a, x, i) => a + x * [.2126, .7152, .0722][i], 0);
        const e = document.querySelector(s), style = getComputedStyle(e);
        const ink = e instanceof SVGElement ? style.fill : style.color;
        const ground = getComputedStyle(document.body).backgroundColor;
        const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
    }""", selector)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_figures_are_readable_in_both_themes(chromium, site, theme):
    with opened(chromium, site / "index.html", theme=theme) as tab:
        assert tab.evaluate("document.documentElement.dataset.theme") == theme
        for s in (".lede", ".plate figcaption", ".rows td", ".plate .wide svg text", ".tiles small"):
            assert contrast(tab, s) >= 4.5, s


def test_the_theme_switch_takes_the_figures_along(chromium, site):
    ink = "getComputedStyle(document.querySelector('.plate .wide svg text')).fill"
    with opened(chromium, site / "index.html") as tab:
        before = tab.evaluate(ink)
        tab.evaluate("document.documentElement.dataset.theme = 'dark'")
        assert tab.evaluate(ink) != before


def test_a_dialog_is_heard_late_too(chromium, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>setTimeout(() => alert('owned'), 300)</script>")
    with pytest.raises(AssertionError, match="a dialog: owned"), opened(chromium, page, late=500): pass


def test_code_unfolds_and_a_link_leads_to_its_page(chromium, site):
    with opened(chromium, site / "index.html") as tab:
        tab.click("nav >> text=Evaluate")
        assert tab.url.endswith("5_evaluate.html")
        cell = tab.locator("details.hide").first
        assert not cell.locator("pre").first.is_visible()
        cell.locator("summary").click()
        assert cell.locator("pre").first.is_visible()


@pytest.mark.parametrize("name", page_names())
def test_every_internal_link_exists(chromium, site, name):
    with opened(chromium, site / f"{name}.html") as tab:
        links = tab.evaluate("[...new Set([...document.querySelectorAll('a[href]')].map(a => a.href))]")
        ids = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
    for url in links:
        if not url.startswith("file:"): continue
        path, _, anchor = url.removeprefix("file://").partition("#")
        path = path.partition("?")[0]
        assert Path(path).is_file(), url
        if anchor and Path(path) == site / f"{name}.html": assert anchor in ids, url


def column(tab, label: str, n: int) -> list[str]:
    "The texts of a table's n-th column as they stand."
    return tab.locator(f'[aria-label="{label}"] tbody tr td:nth-child({n})').all_inner_texts()


def test_a_click_on_a_heading_sorts_a_table(chromium, site):
    label = "Gain against forgetting"
    with opened(chromium, site / "index.html") as tab:
        saved = column(tab, label, 1)
        heading = tab.locator(f'[aria-label="{label}"] th >> nth=0')
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == "ascending" and column(tab, label, 1) == sorted(saved)
        tab.keyboard.press("Enter")    # the button has the focus
        assert heading.get_attribute("aria-sort") == "descending" and column(tab, label, 1) == sorted(saved, reverse=True)
        tab.locator(f'[aria-label="{label}"] th >> nth=2').locator("button").click()
        gains = column(tab, label, 3)
        numbers = [float(g.split()[0].replace("\N{MINUS SIGN}", "-")) for g in gains if g != "–"]
        assert numbers == sorted(numbers) and gains[-1] == "–" and sorted(column(tab, label, 1)) == sorted(saved)


def test_a_table_of_a_stage_comes_as_csv_with_all_its_digits(chromium, site, tmp_path):
    with opened(chromium, site / "5_evaluate.html") as tab:
        button = tab.locator('button.csv[aria-label*="tokens seen"]').first
        with tab.expect_download() as got: button.click()
        got.value.save_as(tmp_path / "table.csv")
    ours, saved = pd.read_csv(tmp_path / "table.csv"), pd.read_csv(site / "tables" / "perplexity.csv")
    pd.testing.assert_frame_equal(ours.rename(columns=lambda c: c.replace(" ", "_")), saved, check_like=True, check_dtype=False, rtol=0, atol=0)


def test_the_first_page_is_there_at_once(chromium, site):
    "Read from disk, drawn and its scripts run; three tries, as other work may take the cores."
    took = []
    for _ in range(3):
        with opened(chromium, site / "index.html") as tab:
            took.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert 0 < min(took) < 2000


@pytest.mark.parametrize("name", ["index", "results", "claims", "3_train", "4_merge", "5_evaluate"])
def test_a_page_prints(chromium, site, name, tmp_path):
    "The contents at the side stay off the paper, and nothing is wider than it."
    with opened(chromium, site / f"{name}.html") as tab:
        tab.emulate_media(media="print")
        tab.set_viewport_size(dict(width=700, height=1000))
        assert not tab.locator("nav.bd-links").is_visible()
        assert [h.is_visible() for h in tab.locator("h1").all()].count(True) == 1, "the title is there once"
        assert not [b for b in tab.locator("button.csv, .copybtn").all() if b.is_visible()]
        assert tab.evaluate("""[...document.querySelectorAll('article figure.plate .wide svg, article p, article .tiles, article .rows table')].every(
            e => e.getBoundingClientRect().right <= innerWidth + 1)""")
        tab.emulate_media(media=None)
        assert tab.pdf(path=tmp_path / "page.pdf")[:5] == b"%PDF-"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", page_names())
def test_axe_finds_nothing_serious(chromium, site, name, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with opened(chromium, site / f"{name}.html", theme=theme) as tab:
        for fold in tab.locator("article details").all(): fold.evaluate("d => d.open = true")
        tab.evaluate("Promise.all(document.getAnimations().map(a => a.finished))")    # opened text fades in
        options = {"preload": False, "resultTypes": ["violations"]}    # it would fetch the style sheets again, and describe all that is right
        if theme == "dark": options |= {"runOnly": {"type": "rule", "values": ["color-contrast"]}}    # colours are all that differs
        found = axe.Axe().run(tab, options=options).response["violations"]
    bad = [(v["id"], v["impact"], len(v["nodes"]), v["nodes"][0]["target"], v["nodes"][0]["failureSummary"][:300]) for v in found if v["impact"] in ("serious", "critical")]
    assert not bad
