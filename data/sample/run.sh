#!/usr/bin/env bash
# The whole way on the sample, from nothing to named photos: 400 ORL faces, a few minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. data/sample/venv.sh
step() { printf '\n== %s\n' "$*"; "$@"; }

step python data/sample/prepare.py
step python preprocess_lips.py
step python split_train_val.py --group '(s\d+)_'
# beside models/model.pt: 400 grey faces say less of other people than the weights that come with the project
step python train.py --recipe finetune --models models/sample
step python predict.py --model models/sample/model.pt --evaluate data/val --crops
persons=$(python -c "
from preprocess_lips import read_csv
from pathlib import Path
print(*sorted({row['group'] for row in read_csv(Path('data/split.csv')) if row['part'] == 'val'}))")
photos=()
for person in $persons; do photos+=(data/raw/*/"${person}"_*.png); done
printf '\n== python predict.py --model models/sample/model.pt ... --save data/named     (photos of the persons kept apart: %s)\n' "$persons"
python predict.py --model models/sample/model.pt "${photos[@]}" --save data/named

cat <<'END'

== Where everything lies
crops, and what became of every photo   data/lips/preview.jpg, data/lips/manifest.csv
the model, its scores, a picture        models/sample/model.pt, model.json and model.png there
photos with their mouths named          data/named/
the curves                              tensorboard --logdir logs     (in .venv/bin)
END
