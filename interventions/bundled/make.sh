#!/bin/sh
# Makes the bundled artifacts again. Run it in the repository's root, with the embedded model
# installed; see README.md beside it.
#
#   sh interventions/bundled/make.sh [FOLDER WITH THE DATA FILES] [FOLDER TO WRITE TO]
set -eu
data=$(cd "${1:-../shared/data}" && pwd)
out=$(cd "${2:-interventions/bundled}" && pwd)
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
export PYTHONPATH="$PWD"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The date in the manifests, fixed so that the same inputs give the same bytes.
export SOURCE_DATE_EPOCH=1795824000 # 2026-11-28
limits="A demonstration on a very small model, not a safety guarantee."

"$python" -m benchmarks.bundled_data "$data" "$work"
cp docs/fit-your-own/rude.txt docs/fit-your-own/polite.txt "$work"
cd "$work"

"$python" -m server fit argre --model embedded --pairs pairs.jsonl --neutral neutral.txt \
    --out detox-argre.safetensors --dtype float32 --threads 2 \
    --beta 1 --batch-size 16 --epochs 4 --learning-rate 2e-4 --neutral-weight 0.3 \
    --reward-quantile 0.05 --direction-scale 1.5 --eta 0.05 \
    --description "Less toxic text. ARGRE reward head and direction, fitted on texts of the \
model's own that are about to say a harmful word, and calm ones with a hidden state near theirs. \
$limits"
mv detox-argre.safetensors "$out"

"$python" -m server fit lineas --model embedded --sites 'model\.norm' \
    --source about_to_swear.txt --target calm.txt --control control.txt \
    --out detox-dsas.safetensors --dtype float32 --threads 2 --pooling last \
    --samples 547 --batch-size 547 --micro-batch 32 \
    --steps 1000 --optimizer adam --learning-rate 0.02 \
    --gate regression --gate-pooling last --gate-components 300 --gate-held-out 0.1 \
    --strength 3 --max-strength 4 \
    --description "Less toxic text. A LinEAS map of the final norm's output, with a DSAS gate that \
opens where the model is about to say a harmful word; fitted on texts of its own. $limits"
mv detox-dsas.safetensors "$out"

"$python" -m server fit lineas --model embedded --source rude.txt --target polite.txt \
    --out detox-lineas.safetensors --dtype float32 --threads 2 \
    --steps 50 --optimizer adam --learning-rate 0.002 --strength 0.65 \
    --description "Less toxic text. LinEAS maps from 32 rude sentences to 32 polite ones. $limits"
mv detox-lineas.safetensors "$out"
