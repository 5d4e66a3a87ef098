#!/usr/bin/env bash
# What a GPU makes of training and prediction, by one command; four minutes on an H100.
#
#     benchmarks/on_gpu.sh                  # results in runs/on_gpu
#     WHEELS=wheels benchmarks/on_gpu.sh    # a folder of wheels with what is missing
#
# For a machine with one GPU, Python 3.10 or newer, torch 2.11 or newer with its
# torchvision, and no network: it trains in float32, bfloat16 and float16 and compares
# average precision, measures the torch engine that serves, and runs train.py and
# predict.py. Libraries of other roads (Ray, Determined, KServe, OpenVINO) need not be
# there. Peers that are missing are named, and left out of the table.
#
# PYTHON is the interpreter: that of .venv if there is one, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${OUT_DIR:-runs/on_gpu}
mkdir -p "$out"
rm -rf "$out/run" "$out"/*.json "$out"/*.md # of a measurement before
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$packages" \
    "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$packages"
fi

"$python" - <<'CHECK'
import importlib.util
import sys

needed = "torch torchvision numpy cv2 PIL tqdm msgspec faster_coco_eval".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: missing {', '.join(missing)}: give their wheels by WHEELS=folder")
import torch

if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} finds no GPU here")
CHECK

failed=()
measure() { # name, script and arguments
  local name=$1
  shift
  echo
  echo "=== $name: $*"
  timeout 240 "$python" "$@" --json "$out/$name.json" || failed+=("$name")
}

measure precision benchmarks/precision.py --quick --train --run "$out/run"
measure train benchmarks/train.py --quick
if "$python" -c 'import sahi' 2>/dev/null; then
  measure predict benchmarks/predict.py --quick --device cuda \
    --checkpoint "$out/run/fp32/last.pt"
else
  echo "left out: the peer SAHI is not installed, so predict.py has nothing to compare"
fi

"$python" - "$out" <<'TABLE'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
names = [out / f"{name}.json" for name in ("precision", "train", "predict")]
rows = [row for path in names if path.exists() for row in json.loads(path.read_text())]
(out / "on_gpu.json").write_text(json.dumps(rows, indent=2) + "\n")
lines = ["| | unit | here | peer | | equal |", "| --- | --- | ---: | ---: | ---: | --- |"]
for row in rows:
    numbers = f"{row['ours']:.4g} | {row['peer']:.4g} | {row['ratio']:.2f}x"
    same = "yes" if row["equal"] else "no"
    lines.append(f"| {row['claim']} | {row['unit']} | {numbers} | {same} |")
lines += ["", f"Machine: {', '.join(sorted({row['machine'] for row in rows}))}"]
(out / "on_gpu.md").write_text("\n".join(lines) + "\n")
print("\n" + "\n".join(lines))
TABLE

if [ ${#failed[@]} -gt 0 ]; then
  echo "error: failed: ${failed[*]}" >&2
  exit 1
fi
