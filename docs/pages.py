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

from sources import Site, link, quoted, toctree

PACKAGES = ("e2e_utils", "kserve_utils")
# Markdown files that the sidebar lists under the notebooks; the others come last.
GUIDE = ("FAQ.md", "kserve_utils/FAULTS.md", "benchmarks/README.md")
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
    "Artefact and engines": "artefact graphs export engines approve side_by_side",
    "Clients, and servers to try": "client servers cluster try_page",
    "The predictor on KServe": "predictor",
    "The handler of TorchServe": "torchserve_utils",
}

PROGRAMS = {
    "ray_files": "Ray",
    "determined_files": "Determined",
    "sample_data": "Sample data",
}

# what the site leaves out: a picture that another host draws, how to make the site
ELSEWHERE = re.compile(r"^(\[!\[|\| read all of it as web pages).*\n", re.M)


def alternative(cell: dict) -> str:
    """What a cell says of its pictures, which myst-nb reads of the cell itself."""
    kinds = (
        kind for one in cell["outputs"] for kind in one.get("metadata", {}).values()
    )
    return "; ".join(kind["alt"] for kind in kinds if "alt" in kind)


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


def add_modules(site: Site) -> dict[str, list[str]]:
    """A page for each public module of PACKAGES, each stage, and all of them.

    Returns:
        The pages of a package's stages, which list those of its modules; first of all
        the page that lists every module.
    """
    index = site.add("e2e_utils", "api/index.md")
    rows, stage_of = "", stages(site.root)
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        site.page_of[package] = index
        paths = sorted((site.root / package).rglob("[!_]*.py"))
        files = [path.relative_to(site.root).as_posix() for path in paths]
        known = [file for file in stage_of if file in files]
        modules: dict[str, dict[str, str]] = {}  # stage -> page -> what it is for
        for file in known + [file for file in files if file not in stage_of]:
            name = file.removesuffix(".py").replace("/", ".")
            if not name.replace(".", "").isidentifier():  # a script, not to be imported
                continue
            title = f"{name}\n{'=' * len(name)}\n\n"
            page = site.add(file, f"api/{name}.rst", f"{title}.. automodule:: {name}\n")
            first = opening(site.read(file), ".py")[0].partition("\n")[0]
            row = f"- {link(index, name, page)}: {first}\n"
            modules.setdefault(stage_of.get(file, "Others"), {})[page] = row
        rows += f"\n## {package}\n"
        found[package] = []
        for stage, pages in modules.items():
            rows += f"\n### {stage}\n\n{''.join(pages.values())}"
            page = f"api/{'-'.join(re.findall(r'[a-z]+', stage.lower()))}.md"
            # at the left without the package, of which the names would not fit
            short = [p[4:-4].split(".", 1)[1] for p in pages]  # api/NAME.rst
            tree = toctree([*pages], titles=short)
            site.text[page] = f"# {stage}\n\n{''.join(pages.values())}{tree}"
            found[package].append(page)
    about = (
        "Every function and class that is meant to be called, from its docstring; "
        "{ref}`genindex` has them by name.\n"
    )
    site.text[index] = f"# All helpers\n\n{about}{rows}"
    found[PACKAGES[0]].insert(0, index)
    return found


def add_scripts(
    site: Site,
    paths: list[Path],
    folder: str,
    note: str = "",
    titles: list[str] | None = None,
) -> str:
    """A page for each script: what it says of itself, and its code.

    Returns:
        A list of them for `{folder}/index.md`, with their toctree.
    """
    rows, pages = "", []
    for path in paths:
        file = path.relative_to(site.root).as_posix()
        told, code = opening(site.read(file), path.suffix)
        first, _, rest = told.partition("\n")
        stem = os.path.splitext(file.removeprefix(f"{folder}/"))[0]
        page = site.add(file, f"{folder}/{stem}.md")
        head = f"# {file}\n\n{first}\n{rest}\n\n{note}\n## Its code\n\n"
        site.text[page] = head + quoted(code, path.suffix)
        pages.append(page)
        rows += f"- {link(f'{folder}/index.md', file, page)}: {first}\n"
    return rows + toctree(pages, titles=titles)


def add_benchmarks(site: Site) -> str:
    index, results = site.add("benchmarks", "benchmarks/index.md"), "README.md"
    paths = sorted((site.root / "benchmarks").glob("*.[ps][yh]"))
    note = f"[What it measured]({results}), and on which machine.\n"
    about = (
        "Each measures this repository and what it is compared with, if anything, in "
        "one run; `make bench` runs all of them, in quick forms. "
        f"The figures are in the [results]({results}).\n"
    )
    scripts = add_scripts(site, paths, "benchmarks", note)
    site.text[index] = f"# The scripts of the benchmarks\n\n{about}\n{scripts}"
    return index


def add_programs(site: Site) -> str:
    """Pages of what is run rather than imported: for a cluster, and for the sample."""
    page, text = "programs/index.md", "# Programs for clusters, and the sample data\n"
    for folder, title in PROGRAMS.items():
        paths = sorted(site.root.glob(f"{folder}/[!_]*.py"))
        titles = [f"{title}: {path.name}" for path in paths]
        scripts = add_scripts(site, paths, "programs", titles=titles)
        text += f"\n## {title}\n\n{scripts}"
    site.text[page] = text
    return page


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
    modules, benchmarks = add_modules(site), add_benchmarks(site)
    programs = add_programs(site)
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
    site.link_back()
    site.text["index.md"] += (
        toctree(notebooks, "Notebooks")
        + toctree([file for file in GUIDE if file in files], "Guide")
        + toctree(modules["e2e_utils"], "Helpers")
        + toctree(modules["kserve_utils"], "Serving")
        + toctree([programs, benchmarks], "Programs")
        + toctree([f for f in files if f not in {"README.md", *GUIDE}], "Project")
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
