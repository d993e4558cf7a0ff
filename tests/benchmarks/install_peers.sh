#!/usr/bin/env bash
# Peers of the kernel's benchmark that would replace torch (nngeometry and BackPACK ask for torchvision) or bring
# TensorFlow (neural-tangents), installed without their dependencies; what they do need is the extra `bench`:
#
#   pip install -c constraints.txt -c tests/benchmarks/constraints.txt -e ".[bench]"
#   tests/benchmarks/install_peers.sh
#
# PYTHON names the interpreter of the environment (default: python). torch is the same before and after.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
version='import importlib.metadata as m; print(m.version("torch"))'
before=$("$python" -c "$version") || { echo "install ntkdyn with the extra bench first; see $0" >&2; exit 2; }

"$python" -m pip install --no-deps -c constraints.txt neural-tangents nngeometry backpack-for-pytorch

# torchntk is on no package index and has no build file: its one folder, at a fixed commit.
commit=376fb72ee184f79d8a9cba28b739ed125d38fa83
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git init -q "$work"
if git -C "$work" fetch -q --depth 1 https://github.com/pnnl/torchntk "$commit" && git -C "$work" checkout -q FETCH_HEAD; then
  cp -r "$work/torchntk" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
else
  echo "torchntk: its repository cannot be reached; the benchmark says 'not installed' in its rows" >&2
fi

after=$("$python" -c "$version")
[ "$before" = "$after" ] || { echo "torch was $before and is now $after" >&2; exit 1; }
"$python" -c '
import importlib.util
for name in ("neural_tangents", "jax", "nngeometry", "backpack", "torchjd", "torchntk"):
    print(f"{name}:", "installed" if importlib.util.find_spec(name) else "missing")
'
