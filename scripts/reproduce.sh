# What reproduce_*.sh share; each sets MODEL, CONFIG, BITS, PLAN_BITS, CTX and PUBLISHED, and sources this.
#
#     scripts/reproduce_NAME.sh [--dry-run] [FOLDER]
#
# The plan (size, memory, disk, time) comes from the shapes in configs/, without network; then WikiText-2 and the model are
# fetched, and `moe2gguf bench` compares. --dry-run shows the plan and the commands. Interrupted, it goes on where it was.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
folder=${1:-reproduce-${CONFIG%.json}}

run() {
    printf '+ %s\n' "$*"
    [ -n "$dry_run" ] || "$@"
}

run_always() {
    printf '+ %s\n' "$*"
    "$@"
}

run_always "$python" "$scripts/plan_from_config.py" "$scripts/configs/$CONFIG" --bits "$PLAN_BITS" --length "$CTX"
run mkdir -p "$folder"
if [ ! -f "$folder/wikitext-2-raw/wiki.test.raw" ]; then
    run curl -fL -o "$folder/wikitext-2.zip" \
        https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip
    run "$python" -m zipfile -e "$folder/wikitext-2.zip" "$folder"
fi
run "$python" -m moe2gguf.cli bench "$MODEL" --bits "$BITS" --folder "$folder" --ctx "$CTX" --length "$CTX" \
    --text "$folder/wikitext-2-raw/wiki.test.raw" --calibration-text "$folder/wikitext-2-raw/wiki.train.raw"
printf '\nPublished, in other harnesses (compare ratios, not rows):\n%s\n' "$PUBLISHED"
