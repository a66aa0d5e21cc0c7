#!/bin/sh
# Checks secagg.pml with Spin. The model must hold for 3 to 5 sites; without any one rule it must not.
set -eu
cd "$(dirname "$0")"
command -v spin >/dev/null && command -v gcc >/dev/null || {
  echo "needs spin and gcc: apt-get install spin gcc" >&2
  exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp secagg.pml "$work"
cd "$work"
passed=0 failed=0

# check EXPECTED OPTIONS...: EXPECTED is "holds" or "fails"
check() {
  expected=$1
  shift
  spin -a "$@" secagg.pml >spin.log 2>&1 || { cat spin.log; exit 2; }
  gcc -w -O2 -DSAFETY -DCOLLAPSE -DMEMLIM=4000 -o pan pan.c 2>gcc.log || { cat gcc.log; exit 2; }
  ./pan -m200000 >pan.log 2>&1 || true
  found=unfinished
  grep -q "errors: 0" pan.log && found=holds
  grep -q "errors: [1-9]" pan.log && found=fails
  grep -q "max search depth too small\|out of memory" pan.log && found=unfinished
  states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' pan.log)
  if [ "$found" = "$expected" ]; then
    passed=$((passed + 1)) verdict=ok
  else
    failed=$((failed + 1)) verdict=WRONG
  fi
  printf '%-6s %-10s %8s states   %s\n' "$verdict" "$found" "$states" "$*"
}

check holds -DN=3 -DC=0
check holds -DN=4 -DC=0
check holds -DN=4 -DC=1
check holds -DN=5 -DC=0 -DATTEMPTS=1
check holds -DN=5 -DC=1
check holds -DN=3 -DC=0 -DHONEST
check holds -DN=4 -DC=0 -DHONEST
check holds -DN=5 -DC=1 -DHONEST

check fails -DN=5 -DC=1 -DATTEMPTS=1 -DSIGN_TWICE
check fails -DN=5 -DC=1 -DATTEMPTS=1 -DNO_SIGNATURES
check fails -DN=5 -DC=1 -DATTEMPTS=1 -DLOW_THRESHOLD
check fails -DN=4 -DC=1 -DATTEMPTS=1 -DSMALL_COHORT
check fails -DN=3 -DC=0 -DNO_CONSUMED
check fails -DN=4 -DC=0 -DHONEST -DFORGET_DROPPED

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
