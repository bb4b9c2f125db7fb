# shellcheck shell=bash disable=SC2034
# What every launcher here adds to a layout: data, output, checkpoints. Set by the environment:
#   DATA       folder with train/valid .bin/.idx and tokenizer.model (see docs/data.md)
#   OUTPUT     folder of the run, on a file system that all nodes share
#   OPTIMIZER  muon, adamw, soap, … (default muon)
#   LR         learning rate (for muon by default the layout's or the preset's)
: "${DATA:?folder with train.bin, valid.bin and tokenizer.model}"
: "${OUTPUT:?folder for checkpoints and logs, shared by all nodes}"
[ "${OPTIMIZER:-muon}" = muon ] || : "${LR:?learning rate of $OPTIMIZER; the layouts know only that of muon}"
lr=${LR:-${lr:-}}
run=(
  --optimizer "${OPTIMIZER:-muon}" ${lr:+--lr "$lr"}
  --train-data-path "$DATA/train" --valid-data-path "$DATA/valid"
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model"
  --data-cache-path "$OUTPUT/index-cache"
  --output-dir "$OUTPUT" --tensorboard-dir "$OUTPUT/tensorboard"
  --save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints"
  --save-interval "${SAVE_INTERVAL:-500}" --keep-last 3 --keep-every 10000
)
