#!/usr/bin/env bash
# Runs the tests and measurements of this folder on a machine with an NVIDIA driver. It needs bash and coreutils, and Python 3
# with PyTorch to compare speed with other libraries. README.md has the details.
#
#   ./run.sh                      everything: kernels, micro, suite, speed
#   ./run.sh micro suite          some parts, in the order given
#   OUT=DIR ./run.sh              results go to DIR instead of ./results
#   FLASH_ATTENTION_DEVICES=cpu ./run.sh suite     another device than cuda
#   SUITE_TESTS='forward minilm' ./run.sh suite    some of the suite's modules
#   SUITE_FILTER=every_ ./run.sh suite             only tests whose names contain a text
#   SPEED_ARGUMENTS='--passes fwd --head-dims 128' ./run.sh speed    a part of the table
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$here/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" || exit 2

export FLASH_ATTENTION_DATA=$here/data
export FLASH_ATTENTION_DEVICES=${FLASH_ATTENTION_DEVICES:-cuda}
# The driver caches compiled kernels: those of one program serve the next.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/flash-attention-cuda-cache}
export CUDA_CACHE_MAXSIZE=${CUDA_CACHE_MAXSIZE:-4294967296}

failed=()
say() { printf '%s\n' "$*"; }

# Compiles every kernel with the driver, on all cores.
part_kernels() {
    local parts i pids=() status=0
    parts=$(nproc)
    for ((i = 0; i < parts; i++)); do
        timeout -k 5 "${KERNELS_SECONDS:-180}" bin/gpu_kernels compile "$i/$parts" >"$out/kernels.$i" 2>&1 &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i" || status=1; done
    cat "$out"/kernels.* | sort | uniq | tee "$out/kernels.txt"
    rm -f "$out"/kernels.[0-9]*
    return $status
}

# Compares every micro-kernel with its stored results.
part_micro() {
    timeout -k 5 "${MICRO_SECONDS:-240}" bin/gpu_kernels micro 2>&1 | tee "$out/micro.txt" | grep -v ': ok$'
    return "${PIPESTATUS[0]}"
}

# Runs the suite, module by module, without those about the emulator and the text of the kernels. A module that fails or hangs
# is run again test by test, each in its own process, because a failed kernel makes its process unusable.
part_suite() {
    local start=$SECONDS limit=${SUITE_SECONDS:-240} status=0 all module modules code test tests line
    all=$(bin/suite --list ${SUITE_FILTER:+"$SUITE_FILTER"} | sed -n 's/: test$//p')
    modules=${SUITE_TESTS:-$(sed 's/::.*//' <<<"$all" | sort -u | grep -vx 'emulator\|ptx_contract')}
    [[ $modules ]] || status=1
    : >"$out/suite.txt"
    for module in $modules; do
        mapfile -t tests < <(grep "^$module::" <<<"$all")
        if ((${#tests[@]} == 0)); then
            say "no test: $module" | tee -a "$out/suite.txt"
            status=1
            continue
        fi
        if ((SECONDS - start > limit)); then
            say "not run, $limit s are over: $module" | tee -a "$out/suite.txt"
            status=1
            continue
        fi
        line=$SECONDS
        timeout -k 5 "${MODULE_SECONDS:-90}" bin/suite --exact "${tests[@]}" >"$out/module.txt" 2>&1
        code=$?
        { say "=== $module"; cat "$out/module.txt"; } >>"$out/suite.txt"
        if ((code == 0)); then
            say "ok     $module: $(grep '^test result:' "$out/module.txt" | sed 's/test result: ok. //; s/; 0 measured.*//') ($((SECONDS - line)) s)"
            grep '^not run' "$out/module.txt"
            continue
        fi
        status=1
        say "FAILED $module, exit status $code; its tests one by one:"
        for test in "${tests[@]}"; do
            if ((SECONDS - start > limit)); then
                say "  not run, $limit s are over: $test"
                continue
            fi
            if timeout -k 5 "${TEST_SECONDS:-40}" bin/suite --exact "$test" >"$out/module.txt" 2>&1; then
                say "  ok     $test"
            else
                say "  FAILED $test, exit status $?"
                { say "=== $test"; cat "$out/module.txt"; } >>"$out/suite.txt"
                grep -A3 'panicked at' "$out/module.txt" | grep -v 'panicked at\|RUST_BACKTRACE\|stack backtrace' | cut -c1-300 | head -4
            fi
        done
    done
    rm -f "$out/module.txt"
    return $status
}

# Measures the table of speed, with other libraries if Python has them.
part_speed() {
    if command -v python3 >/dev/null; then
        # shellcheck disable=SC2086
        python3 benches/peers.py --program bin/gpu_speed --output "$out" ${SPEED_ARGUMENTS:-}
    else
        say 'no python3: our numbers only'
        # shellcheck disable=SC2086
        timeout -k 5 "${SPEED_SECONDS:-400}" bin/gpu_speed ${SPEED_ARGUMENTS:-} | tee "$out/speed.jsonl"
    fi
}

parts=("$@")
((${#parts[@]})) || parts=(kernels micro suite speed)
for part in "${parts[@]}"; do
    case $part in
        kernels | micro | suite | speed) ;;
        *)
            say "no part \`$part\`: kernels, micro, suite, speed" >&2
            exit 2
            ;;
    esac
done
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
sed -n 's/^- commit: /commit /p' README.md
for part in "${parts[@]}"; do
    start=$SECONDS
    say "=== $part"
    "part_$part" || failed+=("$part")
    say "--- $part: $((SECONDS - start)) s"
done
if ((${#failed[@]})); then
    say "failed: ${failed[*]}; results are in $out"
    exit 1
fi
say "all passed: ${parts[*]}; results are in $out"
