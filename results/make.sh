#!/bin/sh
# Makes every record that lies in results/tiny, and leaderboard.md. Some minutes on a laptop; what is there is skipped.
# `sh results/make.sh smollm2-135m` makes those of a real model on real users instead: see results/grid.sh.
# shellcheck disable=SC2046,SC2086 # lists of options are split on purpose
set -eu
cd "$(dirname "$0")/.."
if [ "${1:-tiny}" != tiny ]; then exec sh results/grid.sh "$1"; fi
harness() { # what is run here is published
    case $1 in
    run | sweep) command harness "$@" --output_path results ;;
    *) command harness "$@" ;;
    esac
}
methods="--method plain --method rag --method cad --method cos --method dola --method decore --method dps"
harness run $methods --task lamp4 --task lamp1 --task lamp2m --task lamp2n --task lamp3 --task lamp5 --task lamp7
harness run --method pag --task lamp4 || [ $? -eq 3 ] # an empty profile is a failed sample
harness run --method rag --method dps --task lamp4 --control wrong_user
harness run --method rag --task lamp2m --control wrong_user
dps="harness run --method dps --task lamp2m"
for draw in 0 1 2; do
    $dps --set control=random_heads --set draw="$draw"
    $dps --set control=random_mask --set draw="$draw"
done
for heads in 2 4 8; do $dps --set heads="$heads"; done
for routing in soft hard; do $dps --set clusters=4 --set samples=200 --set routing="$routing"; done

# personas: where a vector steers (Figures 1 and 5 of the persona-bias paper)
persona="--task_set prompts=tiny --temperature 1 --max_new_tokens 32 --judge lexicon"
vector="--set judge=lexicon"
traits="christianity islam hinduism judaism african_american asian_american native_american hispanic caucasian"
harness sweep --method persona_vector $(printf -- '--task persona:%s ' $traits) $persona $vector \
    --set layer=0..4 --task_set rollouts=5 --users 10
# the printed layers read as blocks, and as hidden states, which are what the block before gives
harness sweep --method persona_vector $(printf -- '--task persona:%s ' christianity islam hinduism judaism) $persona $vector \
    --set "numbering=blocks|hidden_states" --task_set rollouts=5 --users 10
# universal clamps are chosen on the questions the vectors were extracted with, a clamp an operation ...
prompted="--task persona:religion $persona --task_set condition=prompted"
choose="harness sweep --method clamp $prompted $vector --split tune --task_set pairs=2 --lowest"
either="universal=published|per_layer"
$choose --set op=neutral --set "$either" --set "band=1|2|3|1-3"
$choose --set op=subtract --set scale=residual --set "$either" --set "band=1|2" --set "coefficient=0.5|0.6|0.7|0.8"
# ... and the lowest coherent ones reported on others, with their controls (table persona-1)
harness run --method plain $prompted
harness sweep --method clamp $prompted $vector --set "numbering=blocks|hidden_states"
harness run --method clamp $prompted $vector --set peaks=1,1,1,3 # as published, with the peaks of the sweep
neutral="--set op=neutral --set universal=per_layer --set band=1-3"
subtract="--set scale=residual --set coefficient=0.7 --set band=1 --set universal=published"
for clamp in "$neutral" "$subtract"; do
    harness sweep --method clamp $prompted $vector $clamp --set "control=none|random|shuffled"
    harness sweep --method clamp $prompted $vector $clamp --set control=random --set "draw=1|2"
    harness run --method clamp $prompted $vector $clamp --fit_task persona:race
done
# the clamp chosen for religions on races
races="--task persona:race $persona --task_set condition=prompted"
harness run --method plain $races
harness sweep --method clamp $races $vector $neutral --set "control=none|random|shuffled"
# what the clamps do to skills that tiny has, beside rag
for clamp in "$neutral" "$subtract"; do
    harness run --method clamp --task lamp4 --task lamp2m --fit_task persona:religion --fit_set prompts=tiny $vector $clamp
done
# what vectors and clamps do to MMLU (Figures 6 and 7); needs its files, and stories260K
shared=${SHARED:-../shared/data}
if [ -d "$shared/mmlu" ]; then
    subjects="subjects=high_school_biology,nutrition,philosophy,sociology,world_religions"
    mmlu="--task mmlu --data $shared/mmlu --task_set $subjects"
    tiny="$mmlu --task_set per_subject=100 --max_new_tokens 32"
    fitted="--fit_set prompts=tiny $vector --set k=0" # no history, as plain
    harness run --method plain --method rag --method dps $tiny
    for trait in $traits; do
        harness run --method persona_vector $tiny --fit_task "persona:$trait" $fitted --set layer=1
    done
    for clamp in "$neutral" "$subtract"; do
        harness run --method clamp $tiny --fit_task persona:religion $fitted $clamp
    done
    stories="$mmlu --task_set per_subject=40 --model $shared/stories260K/hf"
    harness run --method plain --method rag --method dps $stories
    harness run --method clamp $stories --fit_task persona:religion --set k=0 --set pairs=10 --set rollouts=1 \
        --max_new_tokens 32
    harness run --method plain --model "$shared/stories260K/hf" --task patching --data "$shared/mmlu" \
        --task_set subjects=global_facts,philosophy,sociology,world_religions --task_set per_subject=4 \
        --task_set groups=attitude,colour,role --task_set "lead=(" --task_set smallest=0.001
fi
# what is trained for a user: a history of tiny is nine short items, so rates of its own, chosen on users of the test split
collective="--set collective_lr=0.003 --set collective_epochs=1"
personal="--set lr=0.03 --set epochs=3 --set batch_size=2"
trained="$personal $collective"
for task in lamp2m lamp4; do
    for control in none wrong_user; do
        for method in perfit oppu; do harness run --method $method --task $task $trained --control $control; done
        for method in lora_p reft; do harness run --method $method --task $task $personal --control $control; done
    done
    for stage in stage1 stage2_cp stage2_p; do
        harness run --method perfit --preset $stage --task $task $trained # Table 4 of PerFit
    done
    harness run --method lora_c --task $task --set lr=0.003 --set epochs=1 --set batch_size=2
    harness run --method style_vector --task $task
done
# its Table 1 and Figures 2 and 4, then Figures 11 and 10
for task in lamp2n lamp4 lamp5 lamp7; do
    harness run --method rag --set k=1 --task delta_vectors --task_set task=$task
done
grid="harness sweep --method perfit --users 60 $trained"
$grid --task lamp2m --set "layers=0|1|2|3|4|1,3|0,2,4|0,1,2,3,4"
$grid --task lamp4 --set "layers=0|1|2|3|4"
$grid --task lamp2m --set "rank=1|4|16" --set "personal_rank=1|4|16"
# which blocks and heads carry a persona into answers
harness run --method plain --task patching
harness leaderboard --output_path leaderboard.md
