#!/bin/sh
# The study, cell by cell; written by results/plan.py. From the repository's root, with FewRel, AG News, DBpedia and
# article files in data/ (README, "On the paper's data"). Any line runs alone, once the first has made the tokenizer; an
# interrupted one goes on where it was. About 2.5 hours on two cores.
set -e

if [ ! -d runs/study/prepared ]; then
# one tokenizer for the whole study (about 5 minutes)
python data.py encode --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --articles-count 90000 --vocab-size 4000 --out runs/study/prepared
fi

# C2: 5000 articles, equal steps (about 5 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 5000 --steps 1000 --repeats 1 --members 3 --deep none --out results/study/c2-steps-5000.json

# C2: 20000 articles, equal steps (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 20000 --steps 1000 --repeats 1 --members 3 --deep none --out results/study/c2-steps-20000.json

# C2: 40000 articles, equal steps (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 40000 --steps 1000 --repeats 1 --members 3 --deep none --out results/study/c2-steps-40000.json

# C2: 90000 articles, equal steps (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --out results/study/c2-steps-90000.json

# C1: three tasks, BERT-6 and BERT-1 (about 22 minutes)
python committee.py --task fewrel agnews dbpedia --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 3 --members 2 --out results/study/c1.json

# C4: the same six BERT-1s as one committee (about 1 minutes)
python committee.py --task fewrel agnews dbpedia --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 6 --out results/study/c4.json

# C3: 10,000 articles of low overlap with fewrel (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm low --arm-count 10000 --out results/study/c3-fewrel-low.json

# C3: 10,000 articles of random overlap with fewrel (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm random --arm-count 10000 --out results/study/c3-fewrel-random.json

# C3: 10,000 articles of high overlap with fewrel (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm high --arm-count 10000 --out results/study/c3-fewrel-high.json

# C3: 10,000 articles of low overlap with agnews (about 4 minutes)
python committee.py --task agnews --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm low --arm-count 10000 --out results/study/c3-agnews-low.json

# C3: 10,000 articles of random overlap with agnews (about 1 minutes)
python committee.py --task agnews --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm random --arm-count 10000 --out results/study/c3-agnews-random.json

# C3: 10,000 articles of high overlap with agnews (about 4 minutes)
python committee.py --task agnews --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm high --arm-count 10000 --out results/study/c3-agnews-high.json

# control: both starts, and not a step of training (about 2 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1 --repeats 1 --members 3 --deep none --lr 0 --matrix-lr 0 --out results/study/control-counts.json

# control: the articles' tokens shuffled within each text (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm shuffled --out results/study/control-shuffled.json

# control: tokens drawn from the unigram distribution (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm unigram --out results/study/control-unigram.json

# control: no start from counts or at neighbours: masked language modelling alone (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --count-start 0 --local-start 0 --position-lr 1 --out results/study/control-plain.json

# C1: without the articles that share ten words in a row with test rows (about 4 minutes)
python committee.py --task fewrel dbpedia --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --arm clean --out results/study/clean.json

# grid: 5 labels a class, 5000 articles (about 1 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 5000 --steps 1000 --repeats 1 --members 3 --deep none --train-per-class 5 --test-per-class 70 --out results/study/grid-5-5000.json

# grid: 5 labels a class, 90000 articles (about 1 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --train-per-class 5 --test-per-class 70 --out results/study/grid-5-90000.json

# grid: 20 labels a class, 5000 articles (about 1 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 5000 --steps 1000 --repeats 1 --members 3 --deep none --train-per-class 20 --test-per-class 70 --out results/study/grid-20-5000.json

# grid: 20 labels a class, 90000 articles (about 1 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 3 --deep none --train-per-class 20 --test-per-class 70 --out results/study/grid-20-90000.json

# grid: 624 labels a class, 5000 articles (about 4 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 5000 --steps 1000 --repeats 1 --members 1 --deep none --train-per-class 624 --test-per-class 70 --out results/study/grid-624-5000.json

# grid: 624 labels a class, 90000 articles (about 2 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 1 --deep none --train-per-class 624 --test-per-class 70 --out results/study/grid-624-90000.json

# C2: 5000 articles, two passes (about 2 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 5000 --epochs 2 --steps 0 --repeats 1 --members 3 --deep none --out results/study/c2-passes-5000.json

# C2: 20000 articles, two passes (about 5 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 20000 --epochs 2 --steps 0 --repeats 1 --members 3 --deep none --out results/study/c2-passes-20000.json

# C2: 40000 articles, two passes (about 8 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 40000 --epochs 2 --steps 0 --repeats 1 --members 3 --deep none --out results/study/c2-passes-40000.json

# C2: 90000 articles, two passes (about 15 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --epochs 2 --steps 0 --repeats 1 --members 3 --deep none --out results/study/c2-passes-90000.json

# C4: three BERT-1s and three of twice the width in one committee (about 10 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 1000 --repeats 1 --members 6 --member-model bert-1 bert-1-wide --out results/study/mixed.json

# C4: three BERT-1s, 300 steps, 20 labels a class (about 2 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 300 --repeats 1 --members 3 --deep none --train-per-class 20 --test-per-class 70 --out results/study/stem-without.json

# C4: the same with a convolutional stem, slow on a CPU (about 15 minutes)
python committee.py --task fewrel --articles 'data/wikipedia/articles-*.jsonl.gz' --raw-dir data --runs-dir runs/study --min-class-size 694 --tokenizer runs/study/prepared/tokenizer.model --articles-count 90000 --steps 300 --repeats 1 --members 3 --deep none --train-per-class 20 --test-per-class 70 --member-model bert-1-conv3 --out results/study/stem-with.json

# Figures and README's tables, from what is there
python results/figures.py
