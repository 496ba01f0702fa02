#!/usr/bin/env bash
# Turns a GPU into evidence: runs each stage for at most 9 minutes and writes DIR/<stage>.json as it goes.
#
#   bench/gpu_report.sh [--output DIR] [STAGE...] [option of bench/report.py...]
#
# Stages: environment baselines probes correctness ops blocks models (all by default). Run it again to go on.
# Needs python3 with torch; no network, no make, no virtual environment. PYTHON names another interpreter.
# fusedres is used as installed; else a wheel in dist/ is unpacked, else the checkout is built, beside DIR never.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
output=${FUSEDRES_REPORT:-$root/bench/results/report}
stages=()
options=()
while (($#)); do
  case $1 in
    --output) output=$2; shift 2 ;;
    -*) options+=("$1" "$2"); shift 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
((${#stages[@]})) || stages=(environment baselines probes correctness ops blocks models)

export PYTHONUNBUFFERED=1
if ! "$python" -P -c "import fusedres.triton_kernels" 2>/dev/null; then
  site=${TMPDIR:-/tmp}/fusedres-site
  wheels=("$root"/dist/fusedres-*.whl)
  source=$root
  if [[ -e ${wheels[-1]} ]]; then source=${wheels[-1]}; fi
  if [[ ! -e $site/fusedres ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" "$source"
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

status=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  timeout --kill-after=10 540 "$python" "$root/bench/report.py" "$stage" --output "$output" "${options[@]}" || status=1
done
exit "$status"
