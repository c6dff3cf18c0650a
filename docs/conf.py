"""The site: README, the guides where they lie, and the API from docstrings. `make docs` builds it, warnings are errors.

The source folder is the repository, so that a link between two pages is the same on the site and in the repository.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import find_lexer_class_for_filename
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx

import vmoe_momentum

ROOT = Path(__file__).parent.parent

project, author = "vmoe_momentum", "the authors of vmoe_momentum"
copyright = f"{author}, Apache-2.0"
version = release = vmoe_momentum.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/*.ipynb",
    "docs/api/*.rst",  # what write_api makes
    *(f"{folder}/**/*.md" for folder in ("benchmarks", "configs", "data", "vmoe_momentum")),
    *(f"{folder}/*.md" for folder in ("benchmarks", "configs", "data")),
]

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = html_show_sourcelink = False
myst_heading_anchors = 4
nb_execution_mode = "off"  # a test runs it; the site shows what it gave then
copybutton_exclude = ".linenos, .gp, .go"

default_role = "code"  # docstrings mark code as Markdown does
smartquotes = False  # p' is a prime
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
add_module_names = False


def write_api(app: Sphinx) -> None:
    """A page for each room that docs/api.md lists."""
    for page in re.findall(r"^api/(.*)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE):
        path = ROOT / "docs" / "api" / f"{page}.rst"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{page}\n{'=' * len(page)}\n\n.. automodule:: {page}\n")


def escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks, as `--help` shows them; |x| and train/* are no markup."""
    for at, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
        parts[2::2] = [rf"\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]
        lines[at] = "`".join(parts)


def pages_in_order() -> list[str]:
    """The pages that the README's table names, in its order: what the site's side bar shows."""
    table = (ROOT / "README.md").read_text().split("## Read on")[1].split("\n## ")[0]
    return re.findall(r"\]\(([\w./-]+)\.(?:md|ipynb)\)", table)


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The side bar's list, which the README in the repository has no use for."""
    if docname == root_doc:
        listed = "\n".join(pages_in_order())
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 2\n\n{listed}\n```\n"


def open_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Links to other files of the repository lead to a page that shows them, rather than to a download."""
    here = app.env.docname
    for link in list(doctree.findall(addnodes.download_reference)):
        path = (ROOT / here).parent.joinpath(link["reftarget"]).resolve().relative_to(ROOT)
        uri = app.builder.get_relative_uri(here, f"files/{path}")
        link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))
        app.env.metadata[here].setdefault("shown", "")
        app.env.metadata[here]["shown"] += f"{path}\n"


def show_sources(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """Those pages, with line numbers."""
    shown = {path for page in app.env.metadata.values() for path in page.get("shown", "").splitlines()}
    for path in sorted(shown):
        lexer = find_lexer_class_for_filename(path) or TextLexer
        body = highlight((ROOT / path).read_text(), lexer(), HtmlFormatter(linenos="inline", cssclass="highlight"))
        title = f"<h2><code>{path}</code></h2>"
        yield f"files/{path}", {"title": path, "body": title + body}, "page.html"


def begin_with_the_readme(app: Sphinx, exception: Exception | None) -> None:
    """A site begins with index.html."""
    if exception is None and app.builder.format == "html":
        (Path(app.outdir) / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n')


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_api)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    app.connect("source-read", add_contents)
    app.connect("doctree-read", open_sources)
    app.connect("html-collect-pages", show_sources)
    app.connect("build-finished", begin_with_the_readme)
