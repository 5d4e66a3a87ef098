"""Sphinx's settings for the site: `make site` writes it to runs/site, offline.

The pages are files of this repository, which `pages.py` arranges. SITE_REPOSITORY, such
as https://github.com/OWNER/NAME, adds links to clone it, to edit a page and to open a
notebook elsewhere; without it there are none.
"""

import contextlib
import inspect
import os
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from pages import arrange, links_of  # noqa: E402
from sources import FOLDER  # noqa: E402

REPOSITORY = os.environ.get("SITE_REPOSITORY", "").rstrip("/")

project = "Object detection on satellite imagery"
html_title = project
smartquotes = False  # would make a dash of the two hyphens of --quick
# myst-nb shows the outputs that the notebooks were committed with; the other common
# tool, nbconvert, makes pages but no search, contents or API reference.
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_heading_anchors = 4
myst_html_meta = {
    "description": "Notebooks that take satellite or aerial pictures from labels and "
    "tiles through training and scores to a detector that is served on KServe"
}

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["ts"]  # TorchServe; it prints what it finds on the machine
viewcode_follow_imported_members = False  # would import it after all
napoleon_use_rtype = False
default_role = "named"  # `name` in a docstring: a link if it is a helper, else code
add_module_names = False
python_use_unqualified_type_names = True

# Furo, because the notebooks stand in a column at the left and a page's headings at the
# right, where other themes put them into a bar at the top; because it is one version
# for every Python that is supported; and because it asks no other host for anything.
html_theme = "furo"
html_theme_options = {"top_of_page_buttons": ["edit"]}
templates_path = ["templates"]
exclude_patterns = [FOLDER]  # of pages; its files are copied
html_static_path = ["site.css", "site.js"]
html_favicon = "favicon.svg"
html_search_scorer = str(ROOT / "docs" / "scorer.js")
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


# an indented paragraph below one that is not
BLOCK = re.compile(r"(^\S.*\n\n)((?:^(?: {4}.*)?\n)*^ {4}.*$)", re.M)
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# of plain text: an example up to the next empty line, code, or a star
STAR = re.compile(r"(^ *>>> .*(?:\n.*\S.*)*|`[^`]*`)|\*", re.M)
TITLE, JOINT = re.compile(r"<h1>[\w./]+"), re.compile(r"[./_]")


class Digits(SearchEnglish):
    """Sphinx's words of English, and "300", which it would leave out."""

    def word_filter(self, word: str) -> bool:
        return word not in self.stopwords


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: an indented paragraph is code, a star is a star."""
    own: set[str] = set()
    if what in ("function", "method", "class"):
        with contextlib.suppress(TypeError, ValueError):  # it has none
            own = set(inspect.signature(obj).parameters)

    def plain(match: re.Match) -> str:
        if match[1] is None:
            return r"\*"
        if ">>>" in match[1]:
            return match[1]
        # an argument of this very function is no link to a helper of the same name
        return f":code:{match[1]}" if match[1].strip("`") in own else match[1]

    pieces = BLOCK.split("\n".join(lines))
    for number, piece in enumerate(pieces):
        if number % 3 == 2:
            language = "pycon" if ">>>" in piece else "text"
            pieces[number] = f".. code-block:: {language}\n\n{piece}\n"
        else:
            pieces[number] = STAR.sub(plain, piece)
    lines[:] = "".join(pieces).splitlines()


def contents(app, what, name, obj, options, lines: list[str]) -> None:
    """A module begins with what it has, and with what its examples take for granted."""
    if what != "module":
        return
    public = {k: v for k, v in vars(obj).items() if not k.startswith("_")}
    own = {
        key: inspect.getdoc(value)
        for key, value in public.items()
        if getattr(value, "__module__", "") == name
        and (inspect.isfunction(value) or inspect.isclass(value))
    }
    if any(">>>" in (told or "") for told in own.values()):
        lines += ["", f"Its examples begin with ``from {name} import *``.", ""]
    if len(own) > 1:
        lines += [""]
        for key, told in own.items():
            first = STAR.sub(lambda m: m[1] or r"\*", (told or "").partition("\n")[0])
            lines += [f"- `{key}`: {first}"]
        lines += [""]


def defaults(app, what, name, obj, options, signature, result):
    """A dataclass's `<factory>` is no Python: Sphinx could not read the types."""
    return (signature or "").replace("<factory>", "...") or None, result


class Named(SphinxRole):
    """Code; a link if it is the name of a helper: `fit`, `train.fit`, `Run.save`."""

    def run(self) -> tuple[list[nodes.Node], list]:
        code = nodes.literal(self.rawtext, self.text, classes=["code"])
        if not NAME.fullmatch(self.text):
            return [code], []
        options = {"reftype": "named", "reftarget": self.text, "refdomain": ""}
        options |= {"module": self.env.ref_context.get("py:module", "")}
        options |= {"refdoc": self.env.docname}
        return [addnodes.pending_xref(self.rawtext, code, **options)], []


def resolve(app, env, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """The link of a name: to its own module, or wherever else it is the only one."""
    if node["reftype"] != "named":
        return None
    name, objects = node["reftarget"], env.get_domain("py").objects
    # a method, an attribute or a module has too common a name to stand alone
    kinds = {"function", "class", "exception"}
    if "." in name:
        kinds |= {"method", "module"}
    fits = [
        full
        for full, found in objects.items()
        if f".{full}".endswith(f".{name}") and found.objtype in kinds
    ]
    own = f"{node['module']}.{name}"
    if own not in fits and len(fits) != 1:
        return content
    found = objects[own if own in fits else fits[0]]
    where = app.builder, node["refdoc"], found.docname, found.node_id
    return make_refnode(*where, content)


class BothThemes(SphinxTransform):
    """A diagram as it is in the light and in the dark; Furo shows the one that fits."""

    default_priority = 1

    def apply(self) -> None:
        for light in list(self.document.findall(nodes.image)):
            if light["uri"].endswith(".svg"):
                dark, stem = light.deepcopy(), light["uri"].removesuffix(".svg")
                light.parent.insert(light.parent.index(light) + 1, dark)
                for image, theme in ((light, "light"), (dark, "dark")):
                    image["uri"] = f"{stem}.{theme}.svg"
                    image["classes"].append(f"only-{theme}")


def dashes_and_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """A dash behind a parameter; Sphinx links a picture of a scale to its own file."""
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ", 1)))
    for picture in doctree.findall(nodes.image):
        picture["scale"] = 100


def setup(app: Sphinx) -> None:
    app.add_search_language(Digits)
    app.add_role("named", Named())
    app.add_transform(BothThemes)
    app.connect("missing-reference", resolve)
    sources = arrange(ROOT, Path(app.srcdir), REPOSITORY)
    app.config.html_extra_path = [str(Path(app.srcdir) / FOLDER)]

    def page_links(app, page, template, context, doctree) -> None:
        context["page_links"] = links_of(sources.get(page), REPOSITORY)
        # a phone breaks the name of a module at its dots
        body = context.get("body", "")
        context["body"] = TITLE.sub(lambda m: JOINT.sub(r"\g<0><wbr>", m[0]), body, 1)

    app.connect("html-page-context", page_links)
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    app.connect("autodoc-process-docstring", contents, priority=401)
    app.connect("autodoc-process-signature", defaults)
    app.connect("doctree-read", dashes_and_pictures)
