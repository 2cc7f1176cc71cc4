#!/usr/bin/env bash
# Fail unless notebooks, package and README.md agree and are clean: running this on a committed checkout changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

unchanged() { # unchanged MEND: fail when the checkout has changes, and say how to mend it
    [ -z "$(git status --porcelain)" ] && return
    git status --short
    git --no-pager diff --stat
    echo "The checkout has changed: $1" >&2
    exit 1
}

unchanged 'commit the changes first; a test that leaves files behind must clean up'
nbdev_clean
unchanged 'run nbdev_clean and commit'
nbdev_export
unchanged 'run nbdev_export and commit'
python tools/build_readme.py
unchanged 'run tools/build_readme.py and commit'
python tools/check_imports.py
echo 'Notebooks, package and README.md agree.'
