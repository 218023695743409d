#!/bin/sh
# The table of erasure in docs/benchmarks.md: 11 concepts, every method, 3 training seeds. About two days
# of one core in full; killed, it goes on where it was. Say for example --only 'density; UCE' --limit 16.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
exec "${PYTHON:-$root/.venv/bin/python}" "$root/scripts/reproduce/erasure_table.py" \
    --output_dir "${OUTPUT:-runs/erasure}" "$@"
