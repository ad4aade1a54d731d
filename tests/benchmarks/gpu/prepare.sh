#!/usr/bin/env bash
# For a machine with a GPU and its own torch, but without a package index. Run this where there is
# one, in the root of a checkout: it puts the other wheels, 3 MB, into the ignored .benchmarks/wheels.
# PYTHON_VERSION is that of the machine with the GPU. There, in the root of the same checkout, with
# that folder:
#     for wheel in .benchmarks/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/site; done
#     PYTHONPATH=/tmp/site python3 tests/benchmarks/gpu/run.py
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
platforms=$(printf -- '--platform %s_x86_64 ' manylinux_2_28 manylinux_2_27 manylinux_2_24 \
  manylinux_2_17 manylinux2014)
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp $platforms \
  -d .benchmarks/wheels -r "$here/wheels.txt"
du -sh .benchmarks/wheels
