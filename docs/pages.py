"""The site's source pages, arranged out of the files of this repository.

README is the first page. Each notebook and Markdown file is a page at its own path,
each module and each benchmark one that is made of its docstring. What else a page links
to, a file or a folder, becomes a page with its text, so that no link is dead.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

PACKAGES = ("e2e_utils", "kserve_utils")
PICTURES = {".jpg", ".jpeg", ".png", ".svg", ".gif", ".webp"}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}
FOLDER = "_pictures"  # of what Sphinx copies as it is: pictures in HTML, the notebooks
# Titles in the sidebar, where a page's own is too long to find it by.
ANSWERS = {
    "FAQ.md": "FAQ",
    "benchmarks/README.md": "Benchmark results",
    "kserve_utils/FAULTS.md": "Server errors",
}
# Of the floors that CONTRIBUTING.md lists, in their order.
STAGES = (
    "Files, boxes and pictures",
    "Scenes and labels",
    "Conversion and tiles",
    "Data and models",
    "Prediction, scores and figures",
    "Training",
)
# Of the other package; its modules that are not named here come last.
SERVING = {
    "The artefact and what runs it": "artefact graphs export engines approve"
    " side_by_side",
    "Clients, and servers to try": "client servers cluster try_page",
    "The predictor on KServe": "predictor",
    "The handler of TorchServe": "torchserve_utils",
}

# [text](target), [name]: target, and src="target" of HTML
LINK = re.compile(
    r"""(\]\(|^\[[^\]\n]+\]: |\b(?:src|srcset|href)=["'])([^)\s"'#]+)""", re.M
)
ANCHOR = re.compile(r"(\]\((?!\w+:)[^)\s#]*#)([^)\s]+)")  # [text](page#Heading)
# what the site leaves out: a picture that another host draws, how to make the site
ELSEWHERE = re.compile(r"^(\[!\[|\| read all of it as web pages).*\n", re.M)


class DeadLink(ValueError):
    """A page links to what the repository does not hold."""


class Site:
    """The pages and where they come from; all paths are relative, with "/"."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.page_of: dict[str, str] = {}  # file of the repository -> page
        self.text: dict[str, str] = {}  # page -> its source
        self.copied: set[str] = set()

    def add(self, file: str, page: str, text: str = "") -> str:
        self.page_of[file], self.text[page] = page, text
        return page

    def read(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8", errors="replace")

    def find(self, path: str, reason: str) -> str:
        """The page of a file or folder, which is made where there is none yet."""
        file = self.root / path
        if path in self.page_of:
            return self.page_of[path]
        if path.startswith("..") or not file.exists():
            raise DeadLink(f"{reason}, which is not there")
        if file.suffix.lower() in PICTURES:
            self.copied.add(path)
            return path
        page = self.add(path, f"files/{path}.md")
        if file.is_dir():
            names = [f"{path}/{f.name}" for f in sorted(file.iterdir()) if f.is_file()]
            rows = [(name, self.find(name, path)) for name in names]
            body = "".join(f"- {link(page, *row)}\n" for row in rows)
        else:
            body = quoted(self.read(path), file.suffix)
        self.text[page] = f"---\norphan: true\n---\n# {path}\n\n{body}"
        return page

    def linked(self, file: str, text: str) -> str:
        """The text of a file with its links turned to pages of the site.

        Raises:
            DeadLink: names the file and the link.
        """

        def turned(match: re.Match) -> str:
            before, target = match.groups()
            if re.match(r"\w+:", target):  # https:, mailto:
                return match[0]
            path = os.path.normpath(os.path.join(os.path.dirname(file), target))
            page = self.find(path, f"{file} links to {target}")
            if page in self.copied and before == "](":
                return f"{before}/{FOLDER}/{page}"
            if before[-1] in "\"'":  # HTML, which Sphinx leaves as it is
                page = re.sub(r"\.(md|rst|ipynb)$", ".html", page)
            return before + relative(self.page_of[file], page)

        return ANCHOR.sub(lambda m: m[1] + slug(m[2]), LINK.sub(turned, text))

    def write(self, folder: Path) -> None:
        """Make a folder hold these pages and no others; equal files stay untouched."""
        wanted = {folder / page: text.encode() for page, text in self.text.items()}
        for name in self.copied:
            wanted[folder / FOLDER / name] = (self.root / name).read_bytes()
        for path in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
            path.unlink()
        for path, content in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it; JupyterLab keeps capitals and commas."""
    return re.sub(r"[^\w-]", "", heading.lower())


def relative(page: str, other: str) -> str:
    return os.path.relpath(other, os.path.dirname(page) or ".")


def link(page: str, name: str, other: str) -> str:
    return f"[{name}]({relative(page, other)})"


def alternative(cell: dict) -> str:
    """What a cell says of its pictures, which myst-nb reads of the cell itself."""
    kinds = (
        kind for one in cell["outputs"] for kind in one.get("metadata", {}).values()
    )
    return "; ".join(kind["alt"] for kind in kinds if "alt" in kind)


def quoted(text: str, suffix: str) -> str:
    """The text of a file as a block of code."""
    return f"`````{LANGUAGES.get(suffix, 'text')}\n{text.rstrip()}\n`````\n"


def opening(text: str, suffix: str) -> tuple[str, str]:
    """A module's docstring, or a shell script's first comment; and what is below it."""
    lines = text.splitlines()
    if suffix == ".py":
        tree = ast.parse(text)
        told = ast.get_docstring(tree) or ""
        end = (tree.body[0].end_lineno or 0) if told else 0
    else:
        end = next((n for n, one in enumerate(lines) if one[:1] != "#"), len(lines))
        told = "\n".join(one[2:] for one in lines[1:end])  # the first names the shell
    return told, "\n".join(lines[end:]).strip()


def stages(root: Path) -> dict[str, str]:
    """Module -> its stage, in the order of the floors, if any, then of SERVING."""
    path = root / "CONTRIBUTING.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    floors = re.findall(r"^\d\. (.*(?:\n   .*)*)", text, re.M)
    found = {
        file: stage
        for stage, floor in zip(STAGES, floors, strict=bool(floors))
        for file in re.findall(r"`(\w+/\w+\.py)`", floor)
    }
    for stage, names in SERVING.items():
        for name in names.split():
            path = root / "kserve_utils" / name
            paths = sorted(path.glob("[!_]*.py")) or [path.with_suffix(".py")]
            found |= {file.relative_to(root).as_posix(): stage for file in paths}
    return found


def toctree(pages: list[str], caption: str = "") -> str:
    head = f":caption: {caption}\n" if caption else ""
    paths = {page: f"/{os.path.splitext(page)[0]}" for page in pages}
    names = "\n".join(
        f"{ANSWERS[page]} <{path}>" if page in ANSWERS else path
        for page, path in paths.items()
    )
    return f"\n```{{toctree}}\n:hidden:\n{head}\n{names}\n```\n"


def add_modules(site: Site) -> str:
    """A page for each public module of PACKAGES; the page that lists them."""
    index = site.add("e2e_utils", "api/index.md")
    rows, pages = "", []
    stage_of = stages(site.root)
    order = list(stage_of)
    for package in PACKAGES:
        site.page_of[package] = index
        rows += f"\n## {package}\n\n"
        stage = ""
        paths = sorted((site.root / package).rglob("[!_]*.py"))
        files = [path.relative_to(site.root).as_posix() for path in paths]
        known = [file for file in order if file in files]
        for file in known + [file for file in files if file not in stage_of]:
            if stage != stage_of.get(file, ""):
                stage = stage_of.get(file, "Others")
                rows += f"\n### {stage}\n\n"
            name = file.removesuffix(".py").replace("/", ".")
            if not name.replace(".", "").isidentifier():  # a script, not to be imported
                continue
            title = f"{name}\n{'=' * len(name)}\n\n"
            page = site.add(file, f"api/{name}.rst", f"{title}.. automodule:: {name}\n")
            pages.append(page)
            first = opening(site.read(file), ".py")[0].partition("\n")[0]
            rows += f"- {link(index, name, page)}: {first}\n"
    about = "Every function and class that is meant to be called, from its docstring.\n"
    site.text[index] = f"# The helpers\n\n{about}{rows}{toctree(pages)}"
    return index


def add_benchmarks(site: Site) -> str:
    """A page for each benchmark: what it says of itself, and its code."""
    results = "benchmarks/README.md"
    index = site.add("benchmarks", "benchmarks/index.md")
    rows, pages = "", []
    for path in sorted((site.root / "benchmarks").glob("*.[ps][yh]")):
        file = path.relative_to(site.root).as_posix()
        text = site.read(file)
        told, code = opening(text, path.suffix)
        first, _, rest = told.partition("\n")
        page = site.add(file, f"benchmarks/{path.stem}.md")
        measured = f"{link(page, 'What it measured', results)}, and on which machine.\n"
        head = f"# {file}\n\n{first}\n{rest}\n\n{measured}\n## The script\n\n"
        site.text[page] = head + quoted(code, path.suffix)
        pages.append(page)
        rows += f"- {link(index, path.name, page)}: {first}\n"
    about = (
        "Each measures this repository and what it is compared with in one run; "
        "`make bench` runs all of them, in quick forms. "
        f"The figures are in the {link(index, 'results', results)}.\n"
    )
    site.text[index] = f"# The benchmarks\n\n{about}\n{rows}{toctree(pages)}"
    return index


def arrange(root: Path, folder: Path, repository: str = "") -> dict[str, str]:
    """Write the sources of all pages into a folder, which is the site's alone.

    Args:
        repository: its URL, if it has one, for the first page to link to.

    Returns:
        The file of the repository that each page, without its ending, comes from.

    Raises:
        DeadLink: a page links to what is not there.
    """
    site = Site(root)
    texts = [*sorted(root.glob("*.md")), *sorted(root.glob("[!.]*/*.md"))]
    files = [path.relative_to(root).as_posix() for path in texts]
    notebooks = [f"notebooks/{p.name}" for p in sorted(root.glob("notebooks/*.ipynb"))]
    for file in [*notebooks, *files]:
        site.add(file, "index.md" if file == "README.md" else file)
    site.page_of["notebooks"] = "index.md"
    reference = [add_modules(site), add_benchmarks(site)]
    for file in files:
        text = ELSEWHERE.sub("", site.read(file))
        if repository and file == "README.md":
            text = text.replace(
                "Clone the repository", f"Clone [the repository]({repository})"
            )
        site.text[site.page_of[file]] = site.linked(file, text)
    for file in notebooks:
        notebook = json.loads(site.read(file))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = site.linked(file, "".join(cell["source"]))
            elif told := alternative(cell):
                cell["metadata"]["mystnb"] = {"image": {"alt": told}}
        site.text[file] = json.dumps(notebook)
    site.copied.update(notebooks)
    project = [file for file in files if file not in {"README.md", *ANSWERS}]
    site.text["index.md"] += (
        toctree(notebooks, "Notebooks")
        + toctree([file for file in ANSWERS if file in files], "Answers")
        + toctree(reference, "Reference")
        + toctree(project, "Project")
    )
    site.write(folder)
    files = [file for file in site.page_of if (root / file).is_file()]
    return {os.path.splitext(site.page_of[file])[0]: file for file in files}


def links_of(file: str | None, repository: str) -> dict[str, str]:
    """Where a page is edited, opened or downloaded: text -> URL.

    A notebook lies beside its page; the other links need a repository.
    """
    if not file:
        return {}
    links = {"Download": Path(file).name} if file.endswith(".ipynb") else {}
    if not repository:
        return links
    links["Edit"] = f"{repository}/edit/main/{file}"
    host, _, name = repository.partition("github.com/")
    if host and name and file.endswith(".ipynb"):
        colab, binder = (
            "https://colab.research.google.com/github",
            "https://mybinder.org",
        )
        links["Colab"] = f"{colab}/{name}/blob/main/{file}"
        links["Binder"] = f"{binder}/v2/gh/{name}/main?urlpath=lab/tree/{file}"
    return links
