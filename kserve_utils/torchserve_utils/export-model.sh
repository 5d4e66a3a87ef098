#!/usr/bin/env bash
# A checkpoint to the folder that goes onto the cluster's volume:
#   OUT_DIR/config/config.properties
#   OUT_DIR/model-store/{properties.json,MODEL_NAME.mar}
set -euo pipefail

if (($# < 2 || $# > 3)); then
  cat >&2 <<TEXT
Usage: $0 CHECKPOINT OUT_DIR [MODEL_NAME]
  CHECKPOINT  of e2e_utils.train, such as runs/demo/training/best.pt
  OUT_DIR     is made; files of the same names are replaced
  MODEL_NAME  in the URL of the server, xview-fasterrcnn by default
PYTHON chooses the interpreter (now: ${PYTHON:-python}).
TEXT
  exit 2
fi

python=${PYTHON:-python}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
stripped=$folder/trained_model_stripped.pth

"$python" "$here/strip_checkpoint.py" --ckpt-path "$1" --new-ckpt-name "$stripped"
"$python" -m kserve_utils.export --stripped-ckpt "$stripped" --out-dir "$2" \
  --model-name "${3:-xview-fasterrcnn}"
