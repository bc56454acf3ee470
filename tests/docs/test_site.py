"""The site builds without a warning, leads nowhere in vain, and fetches nothing.

Built once, in a process of its own: mkdocs speaks and warns in ways that are its own affair.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest

import mxtorq
from browser import Tab
from mxtorq.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("material", "mkdocstrings", "latex2mathml")),
    reason="needs the extra docs: pip install 'mxtorq[docs]'",
)

LOADED = (
    r'<(?:script|img|iframe|source|video|audio)[^>]+?src="([^"]+)"',
    r'<link[^>]+?rel="?(?:stylesheet|preload|preconnect|icon)[^>]+?href="([^"]+)"',
    r"@import\s+(?:url\()?[\"']?([^\"')]+)",
    r"url\([\"']?(?!data:)([^\"')]+)",
)
"""What a browser fetches of its own accord, in pages and in style sheets."""


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", out],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def page(site: Path, name: str) -> str:
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    start = page(site, "index")
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        built = name.removesuffix("README") + "index" if name.endswith("README") else name
        assert (site / f"{built}.html").is_file(), name
        link = re.escape(quote(built))
        found = re.findall(rf'<a href="{link}.html" class="md-nav__link', start)
        assert len(found) == 1 or built == "index" or built.endswith("/index"), (name, found)


def fetched(text: str) -> list[str]:
    return [found for pattern in LOADED for found in re.findall(pattern, text)]


def test_nothing_is_fetched_from_a_network(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        assert [name for name in fetched(text) if re.match(r"(https?:)?//", name)] == [], path
    assert fetched('<script async src="https://cdn.example/x.js"></script>')
    assert fetched('<link rel="stylesheet" href="//fonts.example/x.css">')


def test_formulas_are_drawn(site: Path) -> None:
    """Every dollar sign of a method's page became MathML."""
    for path in (DOCS / "methods").glob("*.md"):
        name = "index" if path.stem == "README" else path.stem
        text = page(site, f"methods/{name}")
        assert "arithmatex" not in text
        wanted = len(re.findall(r"^\$\$", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert text.count('display="block"') >= bool(wanted), path
    assert page(site, "numerics").count("<math") > 20


@pytest.mark.parametrize("formula", ["x^{", r"\nosuchcommand{1}"])
def test_a_formula_that_cannot_be_read_ends_the_build(formula: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# A page\n\n$$ {formula} $$\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: a\nmarkdown_extensions:\n  - pymdownx.arithmatex:\n      generic: true\n"
        f"hooks:\n  - {DOCS / 'hooks' / 'formulas.py'}\n"
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert repr(formula) in done.stderr


def test_links_that_leave_the_documentation(site: Path) -> None:
    """They are paths of the repository on the site; a link to nothing ends the build."""
    assert "<code>recipes</code>" in page(site, "methods/index")
    for path in site.rglob("*.html"):
        assert 'href="../../src' not in path.read_text(encoding="utf-8")


def test_the_page_of_commands_has_every_verb(site: Path) -> None:
    text = page(site, "cli")
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"mxtorq {command.callback.__name__}</" in re.sub(r"<a class=.*?</a>", "</", text)
    for option in ("--calibration-tokens", "--undo-transforms", "--against", "--engine"):
        assert f"<code>{option}</code>" in text
    assert "[default: 65536]" in text
    assert r"\[" not in text


def test_every_public_name_is_documented(site: Path) -> None:
    text = page(site, "api/index")
    found = re.findall(r'href="(\w+)\.html#([\w.]+)"><code>(\w+)</code>', text)
    assert sorted(name for _, _, name in found) == sorted(mxtorq.__all__)
    for room, anchor, _ in found:
        assert f'id="{anchor}"' in page(site, f"api/{room}"), anchor


@pytest.mark.parametrize("name", ["tour", "methods/torq", "numerics", "cli", "api/formats"])
def test_pages_in_a_browser(site: Path, browser: Tab, name: str) -> None:
    """From a folder, without a network: no complaint, no request that leaves it, no page that is
    wider than its screen, in light and dark, on a desk and a phone."""
    for width, dark in ((1280, False), (400, True)):
        browser.open(site / f"{name}.html", width, dark=dark)
        overhang = browser.value("document.documentElement.scrollWidth - window.innerWidth")
        assert overhang <= 0, (name, width, overhang)
    assert browser.complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


def test_the_search_finds(site: Path, browser: Tab) -> None:
    """Typed into the search of a page that was opened from a folder."""
    browser.open(site / "index.html", 1280)
    browser.value(
        "(() => { const i = document.querySelector('[data-md-component=search-query]');"
        "i.focus(); i.value = 'rceil'; i.dispatchEvent(new Event('input', {bubbles: true}));"
        "i.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true})); })()"
    )
    found = 0
    for _ in range(100):
        found = browser.value("document.querySelectorAll('.md-search-result__item').length")
        if found:
            break
        browser.value("new Promise(r => setTimeout(r, 50))")
    assert found
    assert browser.complaints == []
