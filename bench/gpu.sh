#!/usr/bin/env bash
# Everything that wants a GPU, in one command: random weights in the shapes of Llama-3-8B, Qwen2-7B and Llama-2-7B, bf16.
#
#   bench/gpu.sh [--device cuda] [--sizes "llama3-8b qwen2-7b"] [--tokens "512 1024 2048"] [--new 32] [--rows "1 16"]
#                [--samples 50] [--loop_heads 16] [--rounds 3] [--trained llama2-7b] [--users 8]
#                [--output bench/results/NAME]
#
# decode    DPS against plain at each prompt length and batch: its overhead, tokens a second, peak memory
# batching  DPS at the largest batch against the released loop of one prompt and two passes a token
# pcs       wall time of a discovery over all heads and samples; the one-head loop is timed on a part and extrapolated
# train     seconds a user and peak memory of training shifts and LoRA, many users together and one after another
# One JSON file each, by default below bench/results/<name of the GPU>. Every measurement is a process of its own, so one
# that fails or runs out of memory leaves the others; a file that is there is not measured again (delete it to).
set -uo pipefail

device=cuda sizes="llama3-8b qwen2-7b" tokens="512 1024 2048" new=32 rows="1 16" samples=50 loop_heads=16 rounds=3
trained=llama2-7b users=8 output=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device | --sizes | --tokens | --new | --rows | --samples | --loop_heads | --rounds | --trained | --users | --output)
      [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"; exit 0 ;;
    *) echo "gpu.sh: unknown option $1; see bench/gpu.sh --help" >&2; exit 2 ;;
  esac
done

called_from="$PWD"
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=$(command -v python || command -v python3) || { echo "gpu.sh: no python on PATH" >&2; exit 1; }
if [[ $device == cuda* ]]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
  [ -n "$name" ] || { echo "gpu.sh: torch sees no CUDA device; to try the script: --device cpu --sizes toy" >&2; exit 4; }
else
  name=$device
fi
case "$output" in
  "") output="bench/results/$(echo "$name" | tr -cs 'A-Za-z0-9\n' '-' | sed 's/-$//')" ;;
  /*) ;;
  *) output="$called_from/$output" ;;
esac

failed=0
measure() { # FILE SCRIPT ARGUMENTS...
  local file="$output/$1.json" script="bench/$2.py"
  shift 2
  if [ -s "$file" ]; then
    echo "there already: $file"
    return
  fi
  echo "$script $*"
  if ! "$python" "$script" --device "$device" --output "$file" "$@"; then
    echo "gpu.sh: failed: $script $*" >&2
    failed=$((failed + 1))
  fi
}

for size in $sizes; do
  for length in $tokens; do
    for count in $rows; do
      measure "decode-$size-$length-$count" decode --size "$size" --tokens "$length" --rows "$count" --new "$new" --rounds "$rounds"
    done
    measure "batching-$size-$length" batching --size "$size" --tokens "$length" --rows "${rows##* }" --new "$new" --rounds 1
    measure "pcs-$size-$length" pcs --size "$size" --tokens "$length" --samples "$samples" --loop_heads "$loop_heads"
  done
done
measure "train-$trained" train --size "$trained" --users "$users" --lessons 16 --tokens 256 512 --epochs 2 --rounds 1
echo "$output"
[ "$failed" -eq 0 ] || { echo "gpu.sh: $failed measurements failed" >&2; exit 1; }
