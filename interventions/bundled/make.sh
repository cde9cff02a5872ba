#!/bin/sh
# Makes detox-lineas.safetensors, detox-argre.safetensors and detox-dsas.safetensors again.
# Run it in the repository's root, with the embedded model installed; see README.md beside it.
#
#   sh interventions/bundled/make.sh [FOLDER WITH THE DATA] [FOLDER TO WRITE TO]
set -eu
data=$(cd "${1:-../shared/data}" && pwd)
out=$(cd "${2:-interventions/bundled}" && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$PWD"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The date in the manifests, fixed so that the same inputs give the same bytes.
export SOURCE_DATE_EPOCH=1795219200 # 2026-11-21

"$python" - "$data/paradetox_fit.tsv" "$work" <<'PYTHON'
import re, sys
from pathlib import Path

source, work = Path(sys.argv[1]), Path(sys.argv[2])
rows = [line.split("\t") for line in source.read_text().split("\n")[1:]]
rows = [row[:2] for row in rows if len(row) == 4 and row[0] and row[1]]

# The marks at the end go: ARGRE takes its direction at the last token.
rows = [[re.sub(r"[\s.!?,;'\"]+$", "", text) for text in row] for row in rows]
rows = [row for row in rows if row[0] and row[1] and row[0] != row[1]]

# LinEAS: the first 128 sentences of 4 to 14 words. Both files hold the same sentences, so that
# their activations differ by what makes a sentence toxic and not by what it is about; and in
# lower case, because only the rewrites begin with capitals.
short = [row for row in rows if 4 <= len(row[0].split()) <= 14][:128]
for name, column in (("toxic.txt", 0), ("neutral.txt", 1)):
    (work / name).write_text("".join(row[column].lower() + "\n" for row in short))
PYTHON

cd "$work"
"$python" -m server fit lineas --model embedded --source toxic.txt --target neutral.txt \
    --out detox-lineas.safetensors --dtype bfloat16 --threads 2 \
    --samples 128 --batch-size 128 --steps 50 --optimizer adam --learning-rate 0.002 \
    --description "Less toxic text. LinEAS maps, fitted on ParaDetox: toxic sentences and their \
neutral rewrites. A demonstration on a very small model, not a safety guarantee."
mv detox-lineas.safetensors "$out"

"$python" -m benchmarks.bundled_data "$data" "$work"

"$python" -m server fit argre --model embedded --pairs pairs.jsonl \
    --out detox-argre.safetensors --dtype float32 --threads 2 \
    --beta 1 --batch-size 16 --epochs 4 --learning-rate 0.001 --reward-quantile 0.1 \
    --direction-scale 0.25 --eta 0.05 \
    --description "Less toxic text. ARGRE reward head and direction, fitted on texts that end just \
before a harmful word and others that do not. A demonstration on a very small model, not a safety \
guarantee."
mv detox-argre.safetensors "$out"

# 600 of each in a batch: the map's loss at one site needs no pass through the model.
"$python" -m server fit lineas --model embedded --source about_to_swear.txt --target calm.txt \
    --out detox-dsas.safetensors --dtype float32 --threads 2 \
    --sites 'model\.norm' --pooling last --samples 600 --batch-size 600 --micro-batch 32 \
    --steps 1000 --optimizer adam --learning-rate 0.02 \
    --gate regression --control control.txt --gate-pooling last --gate-components 200 \
    --strength 2 --max-strength 4 \
    --description "Less toxic text. A LinEAS map after the final norm with a gate (DSAS), which \
opens where a harmful word is likely to come next. A demonstration on a very small model, not a \
safety guarantee."
mv detox-dsas.safetensors "$out"
