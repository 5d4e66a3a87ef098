"""xView's 60 classes: type ids, category ids, names.

Copy: this file and xview_classes.json.
"""

import json
from pathlib import Path


def read_classes(
    category_id_remapping: str | Path | None = None,
    xview_class_labels: str | Path | None = None,
) -> dict[int, tuple[int, str]]:
    """The classes of xView: {type_id: (category_id, name)}, 60 without arguments.

    Names and ids come from xview_classes.json next to this file; it says which of the
    two official name lists it follows. The arguments replace them, in the formats of
    DIUx-xView.

    Args:
        category_id_remapping: JSON, {"type_id": "category_id"}; a class that it lacks
            is dropped. Left out: the position of the class in ascending type_id.
        xview_class_labels: text, a line "type_id:name" a class.

    Raises:
        ValueError: a file is not of that form, or a class has no name.

    Example:
        >>> classes = read_classes()
        >>> len(classes), classes[18]  # by type id
        (60, (5, 'Small Car'))
    """
    here = Path(__file__).with_name("xview_classes.json")
    table = json.loads(here.read_text())["classes"]
    names = {row["type_id"]: row["name"] for row in table}
    source: str | Path = here
    try:
        if xview_class_labels is not None:
            source, names = xview_class_labels, {}
            for line in Path(source).read_text(encoding="utf-8").splitlines():
                if line.strip():
                    type_id, name = line.split(":", 1)
                    names[int(type_id)] = name.strip()
        remapping = {type_id: i for i, type_id in enumerate(sorted(names))}
        if category_id_remapping is not None:
            source = category_id_remapping
            remapping = json.loads(Path(source).read_text(encoding="utf-8"))
            remapping = {int(old): int(new) for old, new in remapping.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: not a class table: {error}") from error
    unnamed = sorted(set(remapping).difference(names))
    if category_id_remapping is not None and xview_class_labels is None and unnamed:
        raise ValueError(f"{source}: type_id {unnamed[0]} is no class of xView")
    return {t: (remapping[t], name) for t, name in names.items() if t in remapping}


def class_names() -> list[str]:
    """Names of a detector's labels for xView: index = label, the background first.

    Example:
        >>> class_names()[:3]
        ['background', 'Fixed-wing Aircraft', 'Small Aircraft']
    """
    return ["background", *(name for _, name in read_classes().values())]
