#!/usr/bin/env bash
# Builds dist/*.whl and dist/*.tar.gz, then installs the wheel as a stranger would: an empty environment, no extras, no
# constraints. UV=1 takes uv instead of pip. Needs a Python of 3.11 or newer (PYTHON) and some 6 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
bare=$(mktemp -d)
trap 'rm -rf "$bare"' EXIT
rm -rf dist build
"$python" -m venv "$bare/tools"
"$bare/tools/bin/pip" install -q build ${UV:+uv}
"$bare/tools/bin/python" -m build --outdir dist .
"$python" -m venv "$bare/env"
if [[ -n ${UV:-} ]]; then
    VIRTUAL_ENV=$bare/env "$bare/tools/bin/uv" pip install dist/*.whl
else
    "$bare/env/bin/pip" install -q dist/*.whl
fi
export PATH="$bare/env/bin:$PATH"
cd "$bare"
vmoe-momentum --version
vmoe-momentum data prepare digits --out digits
python -c 'import torch, vmoe_momentum; print(vmoe_momentum.create_model("vmoe_tiny_patch4_16", rule="HeavyBall", num_classes=10)(torch.zeros(1, 3, 16, 16)).shape)'
echo "installed: $(du -sm "$bare/env" | cut -f1) MB, torch and what it brings $(du -scm "$bare"/env/lib/python*/site-packages/{torch,nvidia*,triton*} 2>/dev/null | tail -n 1 | cut -f1) MB of it"
