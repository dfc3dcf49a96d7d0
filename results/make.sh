#!/bin/sh
# Makes every record that lies in results/tiny, and leaderboard.md: some 20 minutes on one core; what is there is skipped.
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

# every method that trains nothing, and what is left of it with another user's history
methods="--method copy --method plain --method rag --method cad --method cos --method dola --method dps"
harness run $methods --task lamp1 --task lamp2m --task lamp2n --task lamp3 --task lamp4 --task lamp5 --task lamp7
# on lamp3 no head copies a rating from the text, so decore has none to contrast with
harness run --method decore --task lamp1 --task lamp2m --task lamp2n --task lamp4 --task lamp5 --task lamp7
lamp="--task lamp2m --task lamp4 --task lamp7"
harness run --method rag --method dps $lamp --control wrong_user
# retrieval, order and k: what bm25 finds, what is newest, what comes by chance
harness sweep --method rag --task lamp2m --task lamp4 --set "retriever=recency|random"
harness sweep --method rag --task lamp2m --task lamp4 --set "k=1|2"
# DPS beside random heads, by the number of heads and by cluster
harness run --method dps --task lamp4 --task lamp7 --set control=random_heads
harness sweep --method dps --task lamp2m --set control=random_heads --set "draw=0|1|2"
harness run --method dps --task lamp2m --set control=random_mask
harness sweep --method dps --task lamp2m --set "heads=2|4|8"
harness sweep --method dps --task lamp2m --set clusters=4 --set samples=200 --set "routing=soft|hard"

# what is trained: on other users (lora_c), for a user (perfit, oppu, cope), at rates chosen on users of the test split
collective="--set collective_lr=0.003 --set collective_epochs=1"
trained="--set lr=0.01 --set epochs=2 --set batch_size=4 $collective"
harness run --method lora_c $lamp --set lr=0.003 --set epochs=1 --set batch_size=4
for control in none wrong_user; do harness run --method perfit --method oppu $lamp $trained --control $control; done
for control in none wrong_user; do harness run --method cope --task lamp4 $trained --control $control; done
# Figure 10 of PerFit, then its Table 1 and Figures 2 and 4
harness sweep --method perfit --users 60 $trained --task lamp2m --set "rank=1|16" --set "personal_rank=1|16"
for task in lamp2n lamp7; do
    harness run --method rag --set k=1 --task delta_vectors --task_set task=$task
done

# personas: where a vector steers (Figures 1 and 5 of the persona-bias paper)
persona="--task_set prompts=tiny --temperature 1 --max_new_tokens 32 --judge lexicon"
vector="--set judge=lexicon"
traits="christianity islam hinduism judaism african_american asian_american native_american hispanic caucasian"
harness sweep --method persona_vector $(printf -- '--task persona:%s ' $traits) $persona $vector \
    --set layer=0..4 --task_set rollouts=2 --users 10
# the printed layers read as blocks, and as hidden states, which are what the block before gives
harness sweep --method persona_vector $(printf -- '--task persona:%s ' christianity islam hinduism judaism) $persona \
    $vector --set "numbering=blocks|hidden_states" --task_set rollouts=2 --users 10
# a universal clamp is chosen on the questions the vectors were extracted with, and reported on others (table persona-1)
prompted="--task persona:religion $persona --task_set condition=prompted"
neutral="--set op=neutral --set universal=per_layer"
harness sweep --method clamp $prompted $vector $neutral --split tune --task_set pairs=2 --lowest --set "band=1|2|3|1-3"
neutral="$neutral --set band=1-3"
harness run --method plain $prompted
harness sweep --method clamp $prompted $vector --set "numbering=blocks|hidden_states" # as published, read either way
harness sweep --method clamp $prompted $vector $neutral --set "control=none|random|shuffled"
# what the clamp does to what the model can do
clamp="--method clamp --fit_task persona:religion --fit_set prompts=tiny $vector $neutral"
harness run $clamp --task lamp4 --task lamp2m
# which blocks and heads carry a persona into answers
harness run --method plain --task patching
harness leaderboard --output_path leaderboard.md
