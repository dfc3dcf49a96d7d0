#!/usr/bin/env bash
# Everything that wants a GPU, in one command: random weights in the shapes of Llama-3-8B, Qwen2-7B and Llama-2-7B, bf16.
#
#   bench/gpu.sh [--device cuda] [--sizes "llama3-8b qwen2-7b"] [--tokens "512 1024 2048"] [--new 32] [--rows "1 16"]
#                [--samples 50] [--loop_heads 16] [--rounds 3] [--trained llama2-7b] [--users 8]
#                [--minutes 0] [--output bench/results/NAME]
#
# decode    DPS against plain at each prompt length and batch: its overhead, tokens a second, peak memory
# batching  DPS at the largest batch against the released loop of one prompt and two passes a token
# pcs       wall time of a discovery over all heads and samples; the one-head loop is timed on a part and extrapolated
# train     seconds a user and peak memory of training shifts and LoRA, many users together and one after another
# The most telling come first: decode with the first of `rows` and pcs at the second length, of each size; then the rest.
# With --minutes N nothing starts, and nothing goes on, after N minutes; what was not measured is named, and the exit code is 3.
# One JSON file each, by default below bench/results/<name of the GPU>. Every measurement is a process of its own, so one
# that fails or runs out of memory leaves the others; a file that is there is not measured again (delete it to).
set -uo pipefail

device=cuda sizes="llama3-8b qwen2-7b" tokens="512 1024 2048" new=32 rows="1 16" samples=50 loop_heads=16 rounds=3
trained=llama2-7b users=8 minutes=0 output=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device | --sizes | --tokens | --new | --rows | --samples | --loop_heads | --rounds | --trained | --users | --minutes | --output)
      [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"; exit 0 ;;
    *) echo "gpu.sh: unknown option $1; see bench/gpu.sh --help" >&2; exit 2 ;;
  esac
done

case "$minutes" in "" | *[!0-9]*) echo "gpu.sh: --minutes $minutes: give a whole number, 0 for no limit" >&2; exit 2 ;; esac

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

failed=0 unmeasured=""
left() { # seconds until the time is up; a year where no limit was given
  [ "$minutes" -eq 0 ] && echo 31536000 || echo $((minutes * 60 - SECONDS))
}
measure() { # FILE SCRIPT ARGUMENTS...
  local file="$output/$1.json" name="$1" script="bench/$2.py" seconds code=0
  shift 2
  if [ -s "$file" ]; then
    echo "there already: $file"
    return
  fi
  seconds=$(left)
  if [ "$seconds" -le 0 ]; then
    unmeasured="$unmeasured $name"
    return
  fi
  echo "$script $*"
  timeout -k 5 "$seconds" "$python" "$script" --device "$device" --output "$file" "$@" || code=$?
  if [ "$code" -ne 0 ] && [ "$(left)" -le 0 ]; then
    unmeasured="$unmeasured $name"
  elif [ "$code" -ne 0 ]; then
    echo "gpu.sh: failed: $script $*" >&2
    failed=$((failed + 1))
  fi
}
decode() { # SIZE ROWS
  for length in $tokens; do
    measure "decode-$1-$length-$2" decode --size "$1" --tokens "$length" --rows "$2" --new "$new" --rounds "$rounds"
  done
}
pcs() { # SIZE LENGTH
  measure "pcs-$1-$2" pcs --size "$1" --tokens "$2" --samples "$samples" --loop_heads "$loop_heads"
}

read -r first_rows _ <<<"$rows"
read -r first_length second_length _ <<<"$tokens"
for size in $sizes; do
  decode "$size" "$first_rows"
  pcs "$size" "${second_length:-$first_length}"
done
for size in $sizes; do
  for count in $rows; do [ "$count" = "$first_rows" ] || decode "$size" "$count"; done
  for length in $tokens; do
    measure "batching-$size-$length" batching --size "$size" --tokens "$length" --rows "${rows##* }" --new "$new" --rounds 1
    [ "$length" = "${second_length:-$first_length}" ] || pcs "$size" "$length"
  done
done
measure "train-$trained" train --size "$trained" --users "$users" --lessons 16 --tokens 256 512 --epochs 2 --rounds 1
echo "$output"
[ -z "$unmeasured" ] || echo "gpu.sh: not measured within $minutes minutes:$unmeasured; the same command goes on" >&2
[ "$failed" -eq 0 ] || { echo "gpu.sh: $failed measurements failed" >&2; exit 1; }
[ -z "$unmeasured" ] || exit 3
