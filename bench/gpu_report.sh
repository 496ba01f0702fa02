#!/usr/bin/env bash
# Turns a GPU into evidence, and writes DIR/<stage>.json as it goes.
#
#   bench/gpu_report.sh [--output DIR] [--budget SECONDS] [STAGE...] [option of bench/report.py and its value...]
#
# Without stages: what is worth most, within the budget, 15 minutes by default (bench/short_report.py); cells that it has
# no room for are skipped by name. With stages, of: environment baselines probes correctness ops blocks models, or all:
# each for at most 9 minutes; they share the budget, if one is given, and what one leaves goes to the next. Run it again
# to go on. Where a cell has lost the device, the rest of its stage runs in a new process.
# Needs python3 with torch; no network, no make, no virtual environment. PYTHON names another interpreter.
# fusedres is used as installed; else a wheel in dist/ is unpacked, else the checkout is built, beside DIR never.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
output=${FUSEDRES_REPORT:-$root/bench/results/report}
budget=
stages=()
options=()
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    -*) if (($# < 2)); then echo "bench/gpu_report.sh: $1 needs a value" >&2; usage >&2; exit 2; fi ;;&
    --output) output=$2; shift 2 ;;
    --budget) budget=$2; shift 2 ;;
    -*) options+=("$1" "$2"); shift 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
if [[ ${stages[*]:-} == all ]]; then stages=(environment baselines probes correctness ops blocks models); fi

export PYTHONUNBUFFERED=1
if ! "$python" -P -c "import fusedres.triton_kernels" 2>/dev/null; then
  site=${TMPDIR:-/tmp}/fusedres-site
  wheels=("$root"/dist/fusedres-*.whl)
  source=$root
  if [[ -e ${wheels[-1]} ]]; then source=${wheels[-1]}; fi
  gpu=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || true)
  if [[ $gpu ]]; then export FUSEDRES_CUDA_ARCHS=${FUSEDRES_CUDA_ARCHS:-$gpu}; fi
  if [[ ! -e $site/fusedres ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" "$source"
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

if ((${#stages[@]} == 0)); then
  exec "$python" "$root/bench/short_report.py" --output "$output" --budget "$((${budget:-900} - SECONDS))" "${options[@]}"
fi

declare -A weight=([correctness]=4 [ops]=2 [blocks]=2 [models]=2) # of a stage's share; 1 for the others
device_lost=3                                                     # bench/report.py's exit status
end=$((SECONDS + ${budget:-86400}))
status=0
for place in "${!stages[@]}"; do
  stage=${stages[place]}
  weights=0
  for later in "${stages[@]:place}"; do weights=$((weights + ${weight[$later]:-1})); done
  share=$(((end - SECONDS) * ${weight[$stage]:-1} / weights))
  stop=$((SECONDS + (share < 540 ? share : 540)))
  echo "== $stage"
  for attempt in 1 2 3; do
    left=$((stop - SECONDS))
    if ((left < 10)); then echo "no time left"; status=1; break; fi
    code=0
    timeout --kill-after=10 "$left" "$python" "$root/bench/report.py" "$stage" --output "$output" \
      --seconds "$((left - left / 25))" "${options[@]}" || code=$?
    if ((code)); then status=1; fi
    if ((code != device_lost)); then break; fi
  done
done
exit "$status"
