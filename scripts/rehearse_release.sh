#!/usr/bin/env bash
# Rehearse a release of what is committed: build, check, install into empty environments, use, test from the sdist. Nothing
# is uploaded.
#
#     scripts/rehearse_release.sh [--demo]     # --demo also runs `apm demo`, on one thread: five minutes
#
# Versions are those of constraints.txt. PYTHON and UV name other programs than python3 and uv.
set -euo pipefail
PYTHON=${PYTHON:-python3} UV=${UV:-uv}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { printf '\n== %s\n' "$*"; }
empty() { # NAME REQUIREMENT...: a new environment with these alone
    "$UV" venv --quiet --python "$PYTHON" "$work/$1"
    "$UV" pip install --quiet --python "$work/$1/bin/python" -c "$root/constraints.txt" "${@:2}"
}

say "build, of a clone"
git clone --quiet "$root" "$work/clone"
"$UV" venv --quiet --python "$PYTHON" "$work/tools"
"$UV" pip install --quiet --python "$work/tools/bin/python" build twine
"$work/tools/bin/python" -m build --outdir "$work/dist" "$work/clone" >"$work/build.txt" 2>&1 || { cat "$work/build.txt"; exit 1; }
"$work/tools/bin/twine" check --strict "$work"/dist/*
ls -l "$work/dist" | awk 'NR > 1 {print $5, $9}'
wheel=$(echo "$work"/dist/*.whl)

say "the wheel alone, in an empty environment"
empty plain "$wheel"
cd "$work" # where no source lies
"$work/plain/bin/python" -c 'import apm_hf; print("import", apm_hf.__version__, "of", apm_hf.__file__.split("/lib/")[1])'
version=$("$work/plain/bin/python" -c 'import apm_hf; print(apm_hf.__version__)')
grep -q "^## $version" "$root/CHANGELOG.md" || { echo "CHANGELOG.md: expected a section for $version"; exit 1; }
"$work/plain/bin/apm" --version
"$work/plain/bin/apm" --help | head -4
"$work/plain/bin/python" -c '
import numpy, apm_hf
photo = numpy.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype="uint8")
apm = apm_hf.APM.load()
print("encode", tuple(apm.encode(photo).shape), "encode_dense", tuple(apm.encode_dense(photo, size=16).shape))' 2>/dev/null

say "the sdist holds what is needed to test"
tar -xzf "$work"/dist/*.tar.gz -C "$work"
sdist=$(echo "$work"/apm_hf-*/)
for name in src tests docs notebooks examples benchmarks scripts hubconf.py mkdocs.yml constraints.txt Makefile CITATION.cff LICENSE; do
    test -e "$sdist/$name" || { echo "sdist: expected $name, found none"; exit 1; }
done
empty tests "${sdist}[dev]"
cd "$sdist"
"$work/tests/bin/python" -m pytest -q --collect-only | tail -1
"$work/tests/bin/python" -m pytest -q tests/test_release.py tests/test_public_api.py tests/test_position_encoding.py tests/test_cli.py 2>&1 | tail -1

if [ "${1:-}" = --demo ]; then
    say "apm demo, of the wheel"
    empty demo "$wheel[demo]"
    cd "$work"
    OMP_NUM_THREADS=1 "$work/demo/bin/apm" demo --output_dir apm 2>&1 | tail -2
    "$work/demo/bin/python" -c 'import apm_hf; from transformers import AutoModel; print("loaded", AutoModel.from_pretrained("apm").num_parameters(), "parameters")' 2>/dev/null
fi
say "rehearsed $version"
