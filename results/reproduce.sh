# The study of results/README.md. Each line is one command: it goes on after an interruption, and does
# nothing if its runs are finished. The data folders come first; the lines without a pre-training of
# their own need those of C1. Then, on two cores, two lines at a time:
#
#     grep '^python data' results/reproduce.sh | sh
#     grep '^[pf].* --checkpoint' results/reproduce.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
#     grep '^python committee\|^cp' results/reproduce.sh | sh
#     python results/collect.py && python results/tables.py && python results/figures.py
#
# data/raw holds FewRel, AG News and DBpedia (data.py fetches them) and article openings, as
# lines of {"title", "text", "wiki"}. (Other articles give other numbers.) The numbers of rows fit the
# 58 relations of FewRel that have at least 694 sentences in our file; the official one has 64 with 700.

# ---- data folders: two minutes ----
python data.py prepare study --articles 'data/raw/wikipedia/articles-*.jsonl.gz' --count 90000 --task fewrel agnews dbpedia --min-class-size 694 --train-per-class 624
python data.py prepare study-marked --tokenizer data/study/tokenizer.model --task fewrel --entity-markers --min-class-size 694 --train-per-class 624
python data.py select study random --overlap random --task fewrel --count 10000
python data.py select study fewrel-low --overlap low --task fewrel --count 10000
python data.py select study fewrel-high --overlap high --task fewrel --count 10000
python data.py select study agnews-low --overlap low --task agnews --count 10000
python data.py select study clean --clean --task fewrel
python data.py select study agnews-high --overlap high --task agnews --count 10000
python data.py select study scrambled --scramble within

# ---- C1, C4 ----
for s in 0 1 2; do python pretrain.py --runs-dir runs/study --data study --model bert-6 --seed $s --set steps=4800 && python finetune.py --runs-dir runs/study --checkpoint runs/study/pretrain/bert-6-seed$s-* --set per_class=20 && python finetune.py --runs-dir runs/study --data study-marked --checkpoint runs/study/pretrain/bert-6-seed$s-* --set per_class=20 pooling=entities; done
for s in 100 101 102 103 104 105; do python pretrain.py --runs-dir runs/study --data study --seed $s --set steps=4800 && python finetune.py --runs-dir runs/study --checkpoint runs/study/pretrain/bert-1-seed$s-* --set per_class=20 && python finetune.py --runs-dir runs/study --data study-marked --checkpoint runs/study/pretrain/bert-1-seed$s-* --set per_class=20 pooling=entities; done

# ---- C2, and FewRel after 2,000 and 4,800 steps ----
for s in 100 101 102; do python pretrain.py --runs-dir runs/5000 --data study --max-articles 5000 --seed $s --set steps=4800 && python finetune.py --runs-dir runs/5000 --checkpoint runs/5000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/20000 --data study --max-articles 20000 --seed $s --set steps=4800 && python finetune.py --runs-dir runs/20000 --checkpoint runs/20000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/20000 --data study-marked --checkpoint runs/20000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 pooling=entities; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/40000 --data study --max-articles 40000 --seed $s --set steps=4800 && python finetune.py --runs-dir runs/40000 --checkpoint runs/40000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/20000-2000 --data study --max-articles 20000 --seed $s --set steps=2000 && python finetune.py --runs-dir runs/20000-2000 --task fewrel --checkpoint runs/20000-2000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/20000-2000 --data study-marked --checkpoint runs/20000-2000/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 pooling=entities; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/5000-short --data study --max-articles 5000 --seed $s --set steps=267 && python finetune.py --runs-dir runs/5000-short --checkpoint runs/5000-short/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/20000-short --data study --max-articles 20000 --seed $s --set steps=1067 && python finetune.py --runs-dir runs/20000-short --checkpoint runs/20000-short/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/40000-short --data study --max-articles 40000 --seed $s --set steps=2133 && python finetune.py --runs-dir runs/40000-short --checkpoint runs/40000-short/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done
python pretrain.py --runs-dir runs/5000 --data study --model bert-6 --max-articles 5000 --seed 0 --set steps=4800 && python finetune.py --runs-dir runs/5000 --checkpoint runs/5000/pretrain/bert-6-seed0-* --no-scratch --set per_class=20
python pretrain.py --runs-dir runs/20000 --data study --model bert-6 --max-articles 20000 --seed 0 --set steps=4800 && python finetune.py --runs-dir runs/20000 --checkpoint runs/20000/pretrain/bert-6-seed0-* --no-scratch --set per_class=20
python pretrain.py --runs-dir runs/40000 --data study --model bert-6 --max-articles 40000 --seed 0 --set steps=4800 && python finetune.py --runs-dir runs/40000 --checkpoint runs/40000/pretrain/bert-6-seed0-* --no-scratch --set per_class=20

# ---- C3 ----
for s in 100 101 102; do python pretrain.py --runs-dir runs/random --data random --seed $s --set steps=2400 && python finetune.py --runs-dir runs/random --checkpoint runs/random/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/random --task fewrel agnews --checkpoint runs/random/pretrain/bert-1-seed$s-* --seeds 5 --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/fewrel-low --data fewrel-low --seed $s --set steps=2400 && python finetune.py --runs-dir runs/fewrel-low --checkpoint runs/fewrel-low/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/fewrel-low --task fewrel --checkpoint runs/fewrel-low/pretrain/bert-1-seed$s-* --seeds 5 --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/fewrel-high --data fewrel-high --seed $s --set steps=2400 && python finetune.py --runs-dir runs/fewrel-high --checkpoint runs/fewrel-high/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/fewrel-high --task fewrel --checkpoint runs/fewrel-high/pretrain/bert-1-seed$s-* --seeds 5 --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/agnews-low --data agnews-low --seed $s --set steps=2400 && python finetune.py --runs-dir runs/agnews-low --checkpoint runs/agnews-low/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/agnews-low --task agnews --checkpoint runs/agnews-low/pretrain/bert-1-seed$s-* --seeds 5 --no-scratch --set per_class=20; done
for s in 100 101 102; do python pretrain.py --runs-dir runs/agnews-high --data agnews-high --seed $s --set steps=2400 && python finetune.py --runs-dir runs/agnews-high --checkpoint runs/agnews-high/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/agnews-high --task agnews --checkpoint runs/agnews-high/pretrain/bert-1-seed$s-* --seeds 5 --no-scratch --set per_class=20; done

# ---- control: without the articles that share a passage with a test row of FewRel ----
for s in 100 101; do python pretrain.py --runs-dir runs/clean --data clean --seed $s --set steps=4800 && python finetune.py --runs-dir runs/clean --task fewrel --checkpoint runs/clean/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20; done

# ---- control: the tokens scrambled within each text ----
for s in 100 101 102; do python pretrain.py --runs-dir runs/scrambled --data scrambled --seed $s --set steps=4800 && python finetune.py --runs-dir runs/scrambled --checkpoint runs/scrambled/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 && python finetune.py --runs-dir runs/scrambled --data study-marked --checkpoint runs/scrambled/pretrain/bert-1-seed$s-* --no-scratch --set per_class=20 pooling=entities; done

# ---- C1 with 5, 100 and all labelled rows of a class ----
python finetune.py --runs-dir runs/study --task fewrel --checkpoint runs/study/pretrain/bert-6-seed0-* --set per_class=5
python finetune.py --runs-dir runs/study --task fewrel --checkpoint runs/study/pretrain/bert-1-seed10[012]-* --set per_class=5
python finetune.py --runs-dir runs/study --task fewrel --checkpoint runs/study/pretrain/bert-6-seed0-* --set per_class=100
python finetune.py --runs-dir runs/study --task fewrel --checkpoint runs/study/pretrain/bert-1-seed10[012]-* --set per_class=100
python finetune.py --runs-dir runs/study --task fewrel --checkpoint runs/study/pretrain/bert-1-seed100-* --set per_class=624

# ---- C4: a member of width 256, a convolutional one; the votes of C1's runs, their latency ----
python pretrain.py --runs-dir runs/study --data study --model bert-1-wide --seed 100 --set steps=4800 && python finetune.py --runs-dir runs/study --checkpoint runs/study/pretrain/bert-1-wide-seed100-* --no-scratch --set per_class=20
python pretrain.py --runs-dir runs/study --data study --model bert-1-conv3 --seed 100 --set steps=4800 && python finetune.py --runs-dir runs/study --checkpoint runs/study/pretrain/bert-1-conv3-seed100-* --no-scratch --set per_class=20
python committee.py --runs-dir runs/study --data study --members 3 --set steps=4800 --finetune-set per_class=20
cp runs/study/committee/*/results.json results/committee-study.json
