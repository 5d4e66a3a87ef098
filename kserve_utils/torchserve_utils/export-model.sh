#!/usr/bin/env bash
# A checkpoint to the folder that goes onto the cluster's volume:
#   OUT_DIR/config/config.properties
#   OUT_DIR/model-store/{properties.json,MODEL_NAME.mar}
set -euo pipefail

usage() {
  cat <<TEXT
Usage: $0 CHECKPOINT OUT_DIR [MODEL_NAME]
  CHECKPOINT  of e2e_utils.train, such as runs/demo/training/best.pt
  OUT_DIR     is made; files of the same names are replaced
  MODEL_NAME  in the URL of the server, xview-fasterrcnn by default
PYTHON chooses the interpreter (now: ${PYTHON:-python}).
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if (($# < 2 || $# > 3)); then
  usage >&2
  exit 2
fi

checkpoint=$1
out_dir=$2
model_name=${3:-xview-fasterrcnn}
python=${PYTHON:-python}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stripped=$(mktemp -d)
trap 'rm -rf -- "$stripped"' EXIT

"$python" "$here/strip_checkpoint.py" --ckpt-path "$checkpoint" \
  --new-ckpt-name "$stripped/trained_model_stripped.pth"
"$python" -m kserve_utils.export --stripped-ckpt "$stripped/trained_model_stripped.pth" \
  --out-dir "$out_dir" --model-name "$model_name"
