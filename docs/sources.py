"""Sources of the site's pages: text, and links between the files that have pages."""

from __future__ import annotations

import os
import re
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".png", ".svg", ".gif", ".webp"}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}
FOLDER = "_pictures"  # of what Sphinx copies as it is: pictures in HTML, the notebooks
# [text](target), [name]: target, and src="target" of HTML
LINK = re.compile(
    r"""(\]\(|^\[[^\]\n]+\]: |\b(?:src|srcset|href)=["'])([^)\s"'#]+)""", re.M
)
DARK = b"(prefers-color-scheme: dark)"
CODE = re.compile(r"(?<![\[`\w])`([\w./-]+\.\w+)`(?![\]`])")  # `file.py`
ANCHOR = re.compile(r"(\]\((?!\w+:)[^)\s#]*#)([^)\s]+)")  # [text](page#Heading)


class DeadLink(ValueError):
    """A page links to what the repository does not hold."""


class Site:
    """The pages and where they come from; all paths are relative, with "/"."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.page_of: dict[str, str] = {}  # file of the repository -> page
        self.text: dict[str, str] = {}  # page -> its source
        self.copied: set[str] = set()
        self.named_by: dict[str, dict[str, None]] = {}  # page -> pages that link to it

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

        own, folder = self.page_of[file], os.path.dirname(file)

        def named(match: re.Match) -> str:
            """A file that has a page is a link to it."""
            for path in (os.path.normpath(os.path.join(folder, match[1])), match[1]):
                page = self.page_of.get(path, own)
                if page != own and not page.startswith("files/"):
                    return f"[{match[0]}]({relative(own, page)})"
            return match[0]

        def turned(match: re.Match) -> str:
            before, target = match.groups()
            if re.match(r"\w+:", target):  # https:, mailto:
                return match[0]
            path = os.path.normpath(os.path.join(folder, target))
            page = self.find(path, f"{file} links to {target}")
            if page in self.copied and before == "](":
                return f"{before}/{FOLDER}/{page}"
            self.named_by.setdefault(page, {})[own] = None
            if before[-1] in "\"'":  # HTML, which Sphinx leaves as it is
                page = re.sub(r"\.(md|rst|ipynb)$", ".html", page)
            return before + relative(own, page)

        text = ANCHOR.sub(lambda m: m[1] + slug(m[2]), LINK.sub(turned, text))
        return CODE.sub(named, text)

    def link_back(self) -> None:
        """Pages of files begin with the pages that they are linked from."""
        for page, others in self.named_by.items():
            if page.startswith("files/"):
                links = ", ".join(f"[]({relative(page, other)})" for other in others)
                head, body = self.text[page].split("\n\n", 1)
                self.text[page] = f"{head}\n\nLinked from {links}.\n\n{body}"

    def write(self, folder: Path) -> None:
        """Make a folder hold these pages and no others; equal files stay untouched."""
        wanted = {folder / page: text.encode() for page, text in self.text.items()}
        for name in self.copied:
            content = (self.root / name).read_bytes()
            wanted[folder / FOLDER / name] = content
            if name.endswith(".svg"):  # a page shows the one that fits its own theme
                for theme, query in (("light", b"not all"), ("dark", b"all")):
                    path = Path(folder, FOLDER, name).with_suffix(f".{theme}.svg")
                    wanted[path] = content.replace(DARK, query)
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


def quoted(text: str, suffix: str) -> str:
    """The text of a file as a block of code."""
    return f"`````{LANGUAGES.get(suffix, 'text')}\n{text.rstrip()}\n`````\n"


def toctree(
    pages: list[str], caption: str = "", titles: list[str] | None = None
) -> str:
    """The sidebar's entries; `titles` instead of the pages' own, if given."""
    head = f":caption: {caption}\n" if caption else ""
    names = [f"/{os.path.splitext(page)[0]}" for page in pages]
    if titles:
        names = [f"{t} <{name}>" for t, name in zip(titles, names, strict=True)]
    names = "\n".join(names)
    return f"\n```{{toctree}}\n:hidden:\n{head}\n{names}\n```\n"
