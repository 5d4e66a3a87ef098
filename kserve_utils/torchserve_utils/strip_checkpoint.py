"""Strip a checkpoint to its weights and what describes them.

    python kserve_utils/torchserve_utils/strip_checkpoint.py \\
        --ckpt-path trained_model.pth --new-ckpt-name trained_model_stripped.pth

A checkpoint of `e2e_utils.train` says everything itself. One of another origin may
lack the architecture, the class names, or the tiles it learned from; the flags give
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from e2e_utils.models import MODELS
from kserve_utils.export import strip_checkpoint


def read_class_names(path: str | Path) -> list[str]:
    """Names by label, background first: from a JSON list, or a class table.

    The list is the names of labels 0, 1, ... with the background; a class table is a
    file such as e2e_utils/xview_classes.json.
    """
    content = json.loads(Path(path).read_text())
    if isinstance(content, dict) and "classes" in content:
        return ["background"] + [row["name"] for row in content["classes"]]
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    raise ValueError(f"{path} is neither a JSON list of names nor a class table")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt-path", required=True, help="file, or Determined folder")
    add("--new-ckpt-name", required=True, help="the file to write")
    add("--architecture", choices=MODELS, metavar="NAME")
    add("--class-names", metavar="FILE", help="JSON, see the docstring")
    add("--settings", type=json.loads, metavar="JSON")
    add("--tile-size", type=int)
    add("--overlap", type=float)
    add("--category-ids", type=int, nargs="+", help="COCO ids of labels 1, 2, ...")
    add("--stretch", metavar="FILE", help="JSON, of scenes of more than 8 bits")
    given = vars(parser.parse_args())
    source, target = given.pop("ckpt_path"), given.pop("new_ckpt_name")
    try:
        if given["class_names"]:
            given["class_names"] = read_class_names(given["class_names"])
        stripped = strip_checkpoint(source, target, **given)
    except (OSError, ValueError) as error:
        sys.exit(f"strip_checkpoint: {error}")
    print(f"wrote {stripped}, {stripped.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
