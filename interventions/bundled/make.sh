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

# LinEAS: the first 128 sentences of 4 to 14 words of ParaDetox (CC0). Both files hold the same
# sentences, so that their activations differ by what makes a sentence toxic and not by what it is
# about. The marks at the end go, and capitals too: only the rewrites have them.
"$python" - "$data/paradetox_fit.tsv" <<'PYTHON'
import re, sys
from pathlib import Path

rows = [line.split("\t") for line in Path(sys.argv[1]).read_text().split("\n")[1:]]
rows = [row[:2] for row in rows if len(row) == 4 and row[0] and row[1]]
rows = [[re.sub(r"[\s.!?,;'\"]+$", "", text) for text in row] for row in rows]
rows = [row for row in rows if row[0] and row[1] and row[0] != row[1]]
short = [row for row in rows if 4 <= len(row[0].split()) <= 14][:128]
for name, column in (("toxic.txt", 0), ("rewrites.txt", 1)):
    Path(name).write_text("".join(row[column].lower() + "\n" for row in short))
PYTHON

"$python" -m server fit lineas --model embedded --source toxic.txt --target rewrites.txt \
    --out detox-lineas.safetensors --dtype bfloat16 --threads 2 \
    --samples 128 --batch-size 128 --steps 50 --optimizer adam --learning-rate 0.002 \
    --description "Less toxic text. LinEAS maps, fitted on ParaDetox: toxic sentences and their \
neutral rewrites. $limits"
mv detox-lineas.safetensors "$out"
