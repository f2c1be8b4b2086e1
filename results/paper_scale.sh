#!/bin/sh
# The paper's scale on one GPU: width 768, vocabulary 30,522, up to 90,000 articles, 50 passes. NOT YET RUN: no machine with a GPU was at hand.
#
#     sh results/paper_scale.sh prepare        where the raw data is: makes carried/ (about 30 MB), all that the GPU's machine needs
#     sh results/paper_scale.sh run [OUT]      on the GPU's machine, again and again: goes on where it was, ends within 9 minutes
#     SIZE=smoke sh results/paper_scale.sh ..  the same in seconds on a CPU, to rehearse
#     COUNTS=20000 MEMBERS=3 TASKS=fewrel MORE="--ft-epochs 10" sh results/paper_scale.sh run results/gpu-first
#                                              less of it, for a first look; in an OUT of its own, for what OUT holds is not run again
#
# Rows a class are the quick preset's (FewRel 100 + 70, 58 relations), as in the rest of the study; ROWS=paper LEAST=700 for the paper's.
# What comes back is small: OUT holds a results.json of each cell, and every fine-tuned model's logits of the test rows (fp16).
set -e
cd "$(dirname "$0")/.."
OUT=${2:-results/gpu}
LIMIT=${LIMIT:-530} # seconds; at the limit the scripts save a checkpoint and end, as after Ctrl-C
if [ "$SIZE" = smoke ]; then
    preset="--preset smoke" rows=smoke vocab="--vocab-size 250 --max-length 32" members=${MEMBERS:-2} counts=${COUNTS:-100 200} top=200
    quick="--preset quick --width 64 --heads 1 --max-length 32 --steps 4 --ft-min-steps 3 --ft-epochs 1"
else
    preset="--preset paper" rows=${ROWS:-quick} vocab="--vocab-size 30522" members=${MEMBERS:-6} counts=${COUNTS:-90000 40000 20000} top=90000
    quick="--preset quick --width 768 --heads 12 --batch-size 256 --steps 8000"
fi
python=$(command -v python || command -v python3)
compile=$($python -c 'import torch; print("--compile" if torch.cuda.is_available() else "")')
RAW=${RAW:-data}
if [ "$1" = prepare ]; then
    exec $python data.py encode --preset $rows --task fewrel agnews dbpedia --raw-dir "$RAW" --articles "$RAW/wikipedia/articles-*.jsonl.gz" \
        --articles-count $top $vocab --min-class-size ${LEAST:-694} --out carried
fi
deadline=$(($(date +%s) + LIMIT))
cell() { # cell NAME FLAGS...: one command of committee.py, in the time that is left
    name=$1; shift
    [ ! -f "$OUT/$name.json" ] || return 0 # finished
    left=$((deadline - $(date +%s)))
    [ $left -gt 20 ] || { echo "out of time before $name; run this again"; exit 0; }
    timeout -s TERM $left $python committee.py --prepared carried --runs-dir runs/gpu --task ${TASKS:-fewrel agnews dbpedia} "$@" $MORE --out "$OUT/$name.json" \
        || { status=$?; collect; [ $status = 143 ] || [ $status = 124 ] && { echo "$name goes on when this is run again"; exit 0; }; exit $status; }
    collect
}
collect() {
    $python results/collect_logits.py runs/gpu/finetune "$OUT/logits.npz"
}
mkdir -p "$OUT"
for n in $counts; do
    cell "paper-$n" $preset $compile --articles-count $n --members $members
done
[ -z "$COUNTS" ] || exit 0
cell "paper-variants" $preset $compile --articles-count $top --members $members --member-model bert-1-wide bert-1-conv2 bert-1-conv3
cell "quick-ingredients" $quick $compile --articles-count $top --members $members
