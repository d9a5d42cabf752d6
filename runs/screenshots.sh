#!/usr/bin/env bash
# The documentation's pictures of the web page, made with a browser and a model at fixed seeds.   runs/screenshots.sh [MODEL] [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
requirements/chromium.sh
exec "${BIN:-.venv/bin}/python" -m runs.screenshots "${1:-toybox}" "${2:-docs/images}"
