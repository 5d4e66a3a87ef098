"""Peak GPU memory of training, by recipe, tile and batch; two minutes on an H100.

    python benchmarks/memory.py            # on a GPU; without one it says so and ends
    python benchmarks/memory.py --quick    # the smallest case alone

Thirty steps and a validation of each case, from random weights, on the drawn data set.
There is no peer: the figures tell which batch a GPU holds. "Reserved" is what PyTorch
took of the GPU, "allocated" what its tensors needed at most; CUDA itself takes some
hundred MiB more.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from precision import drawn_tiles

from e2e_utils.config import from_recipe
from e2e_utils.prepare import prepare_tiles
from e2e_utils.train import fit

# recipe, side of a tile in pixels, tiles a step
CASES = [("sample", 300, 2), ("sample", 300, 8)]
CASES += [("xview", 300, batch) for batch in (2, 8, 16, 32)]
CASES += [("xview", 640, batch) for batch in (2, 8)]


def measure(tiles: Path, output: Path, recipe: str, size: int, batch: int) -> dict:
    """Train 30 steps and validate: GiB at the peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    changes = {"weights": None, "weights_backbone": None, "batch_size": batch}
    changes |= {"steps": 30, "epochs": None, "eval_steps": 30, "workers": 4}
    fit(from_recipe(recipe, tiles, output, tile_size=size, **changes), progress=False)
    return {
        "recipe": recipe,
        "tile": size,
        "batch": batch,
        "allocated": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest case alone")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"left out: torch {torch.__version__} finds no GPU here")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiles = {300: drawn_tiles(work, 6)}
        tiles[640] = work / "tiles_640"
        coco = {side: work / "coco" / f"{side}.json" for side in ("train", "val")}
        scenes = work / "xview" / "train_images"
        how = {"val_coco": coco["val"], "slice_size": 640}
        prepare_tiles(scenes, coco["train"], tiles[640], **how)
        row = "{:<8}{:>5}{:>6}{:>11}{:>10}"
        print(row.format("recipe", "tile", "batch", "allocated", "reserved"), " GiB")
        for n, case in enumerate(CASES[: 1 if arguments.quick else None]):
            rows.append(measure(tiles[case[1]], work / f"run{n}", *case))
            print(row.format(*rows[-1].values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
