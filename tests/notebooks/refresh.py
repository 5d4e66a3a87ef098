"""Take what a demo made over into the repository: `refresh.py RUN NOTEBOOKS`.

Outputs stay exactly as the run left them, but for progress bars, whose widgets mean
nothing without their kernel, and papermill's own metadata, which holds paths. Pictures
keep their alternative texts. The SHA-256 of the code that was executed is noted. The
picture of README comes along.
"""

import shutil
import sys
from hashlib import sha256
from pathlib import Path

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without progress bars, timings and papermill's metadata."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            for output in cell.outputs:
                if "metadata" in output:
                    told = output.metadata.items()
                    output.metadata = {k: v for k, v in told if k.startswith("image/")}
    return notebook


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code of a notebook."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return sha256("\0".join(sources).encode()).hexdigest()


def main(run: str, target: str) -> None:
    for path in sorted((Path(run) / "notebooks").glob("*.ipynb")):
        notebook = clean(nbformat.read(path, as_version=4))
        if any(c.cell_type == "code" and not c.execution_count for c in notebook.cells):
            sys.exit(f"{path} was not executed to its end; run `make demo` first")
        notebook.metadata["executed"] = digest(notebook)
        nbformat.write(notebook, Path(target) / path.name)
        print(f"{path.name}: {(Path(target) / path.name).stat().st_size // 1024} KiB")
        if path.stem == "03_local_training":
            shutil.copy(Path(run) / "training" / "scene.jpg", target)


if __name__ == "__main__":
    main(*sys.argv[1:])
