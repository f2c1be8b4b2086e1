# The study of results/README.md. Each line is a command of its own: it runs alone, goes on after an
# interruption, and does nothing if its runs are finished. Lines that train need the lines that make
# their data folder. On two cores, this runs two lines at a time, after the folders are made:
#
#     grep '^python data.py' results/reproduce.sh | sh
#     grep '^python [pfc]' results/reproduce.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
#     python results/collect.py
#
# data/raw needs FewRel, AG News and DBpedia (data.py fetches them) and wikipedia/articles-*.jsonl.gz,
# article openings as lines of {"title", "text", "wiki"}. (With articles of your own the numbers will
# differ.) The numbers of rows fit FewRel's 58 relations with at least 694 sentences.

# ---- data folders ----
python data.py prepare study --articles 'data/raw/wikipedia/articles-*.jsonl.gz' --count 90000 --task fewrel agnews dbpedia --min-class-size 694 --train-per-class 624
python data.py prepare study-marked --tokenizer data/study/tokenizer.model --task fewrel --entity-markers --min-class-size 694 --train-per-class 624
python data.py select study fewrel-low --overlap low --task fewrel --count 10000
python data.py select study fewrel-high --overlap high --task fewrel --count 10000
python data.py select study agnews-low --overlap low --task agnews --count 10000
python data.py select study agnews-high --overlap high --task agnews --count 10000
python data.py select study random --overlap random --task fewrel --count 10000

# ---- C1 and C4: a BERT-6 and six BERT-1s, the same number of tokens for each ----
python committee.py --runs-dir runs/study --data study --members 6 --jobs 1 --set steps=4800 --finetune-set per_class=20
