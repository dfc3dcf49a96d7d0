#!/bin/sh
# Makes the records that results/MODEL.txt lists, one command a line: sh results/make.sh smollm2-135m
#   MODEL   its weights: a GGUF file or a folder          SHARED  folder with lamp/ and mmlu/   [../shared/data]
#   JOBS    commands at a time [1]; six share 80 GB       OUTPUT  where records go              [results]
#   HARNESS the command, as in "python -m harness"        HARNESS_CACHE  what is fitted and kept between commands
#   LINES   only these line numbers, as in "6 7 8"        EXTRA   added to every command, as in "--limit 4"
# What is there is skipped, a killed command goes on. Logs and seconds of every line: $OUTPUT/<model>.log/
# shellcheck disable=SC2034,SC2154 # the lines read the variables
set -eu
cd "$(dirname "$0")/.."
name=$1
list=results/$name.txt
export SHARED="${SHARED:-../shared/data}" OUTPUT="${OUTPUT:-results}" EXTRA="${EXTRA:-}"
export MODEL="${MODEL:-$SHARED/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}" HARNESS="${HARNESS:-harness}"
# commands side by side: no threads to fight over cores, and memory of a shared GPU in pieces that can be given back
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
logs=$OUTPUT/$name.log
rates=$logs/rates
mkdir -p "$rates"

if [ "${2:-}" != --line ]; then
    numbers=$(grep -nEv '^(#|$)' "$list" | cut -d: -f1)
    stage=
    for number in ${LINES:-$numbers} end; do
        if [ "$number" != end ] && [ "$(sed -n "${number}p" "$list")" != wait ]; then
            stage="$stage $number"
        elif [ -n "$stage" ]; then
            # shellcheck disable=SC2086
            printf '%s\n' $stage | xargs -P "${JOBS:-1}" -n 1 sh results/grid.sh "$name" --line || true
            stage=
        fi
    done
    # what the records say of each other, while the samples are here
    PYTHONPATH="$PWD" python results/comparisons.py "$OUTPUT/$name" >"$logs/comparisons.md" 2>"$logs/comparisons.err" || true
    awk -F '\t' '$2 != 0 && $2 != 3 { print "line " $1 " failed (exit " $2 "); see its log"; bad = 1 } END { exit bad }' "$logs"/*.tsv
    exit
fi

lamp="--data $SHARED/lamp --fit_split dev:0.1"
lamp1="$lamp --batch_size 50"
lamp2m="$lamp --batch_size 50"
lamp3="$lamp --batch_size 50"
lamp4="$lamp --batch_size 50 --limit 200"
lamp5="$lamp --batch_size 50 --limit 200"
lamp7="$lamp --batch_size 100 --limit 400 --task_set complete=true"
# those with the longest histories, and for choosing rates sixty of the others, a fifth of whom nothing is fitted on
longest4="--data $SHARED/lamp --batch_size 50 --task_set most_active=100 --task_set train_from=dev"
longest7="$longest4 --task_set complete=true"
apart4="$longest4 --split train --limit 60"
apart7="$longest7 --split train --limit 60"
fitted="--fit_split train:0.8"
reft="batch_size=4 --set epochs=3"
lora_p="batch_size=4 --set epochs=3"
persona="--temperature 1 --max_new_tokens 64 --judge words --batch_size 100"
vector="--set k=0 --set rollouts=1"
# what one core of a CPU does in about half an hour a line
cpu="$lamp --batch_size 8"
some7="$longest7 --limit 50"
some4="$longest4 --limit 20"
a_few="--fit_split train:0.02"
# the comparison with the unedited model takes as long as answering, so there of four answers
brief="--effect_samples 4"
mmlu="--data $SHARED/mmlu --batch_size 64"
of_personas="--max_new_tokens 64 $vector"
patching="--data $SHARED/mmlu --task_set lead=( --task_set smallest=0.001"

best() { # the point of a sweep that was best, as options; an option nobody knows where there is none
    python -c 'import json, sys
print(*("--set " + part for part in json.load(open(sys.argv[1]))["peak"]["point"].split()))' "$rates/$1" ||
        echo "--no-sweep-$1"
}

number=$3
command=$(sed -n "${number}p" "$list")
log=$logs/$(printf %03d "$number")
start=$(date +%s)
code=0
{ eval "$HARNESS $command --model $name --model_path '$MODEL' --dtype float32 --output_path '$OUTPUT' $EXTRA"; } \
    >"$log.out" 2>"$log.err" || code=$?
printf '%s\t%s\t%s\t%s\n' "$number" "$code" "$(($(date +%s) - start))" "$command" >"$log.tsv"
