#!/bin/sh
# Prints a Python 3.12 or newer: $PYTHON, python3.12 on the PATH, pyenv's newest 3.12, or one that uv knows.
set -u
good() { "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }
for candidate in "${PYTHON:-}" python3.12 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12 "$(uv python find 3.12 2>/dev/null)"; do
    if [ -n "$candidate" ] && good "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "Python 3.12 was not found (looked at \$PYTHON, python3.12 and python3 on the PATH, pyenv's versions, uv):" \
    "install it, for example by 'uv python install 3.12' or 'pyenv install 3.12'." >&2
exit 1
