#!/usr/bin/env bash
# Fails where nbdev_export or nbdev_clean would change a file: library and notebooks must say the same.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$here/nbs" "$here/domain_adapt" "$here/settings.ini" "$here/pyproject.toml" "$copy"
find "$copy" -name __pycache__ -prune -exec rm -rf {} +
cp -r "$copy" "$copy.before"
trap 'rm -rf "$copy" "$copy.before"' EXIT
export PATH="$here/.venv/bin:$PATH"
(cd "$copy" && nbdev_export && nbdev_clean)
find "$copy" -name __pycache__ -prune -exec rm -rf {} +
diff -r "$copy.before" "$copy" || { echo "error: run nbdev_export && nbdev_clean, or nbdev_update, and commit what changes" >&2; exit 1; }
