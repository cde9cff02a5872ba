#!/bin/sh
# Makes detox-lineas.safetensors and detox-argre.safetensors again, from ParaDetox (CC0).
# Run it in the repository's root, with the embedded model installed; see README.md beside it.
#
#   sh interventions/bundled/make.sh [FOLDER WITH paradetox_fit.tsv] [FOLDER TO WRITE TO]
set -eu
data=${1:-../shared/data}
out=$(cd "${2:-interventions/bundled}" && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$PWD"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The date in the manifests, fixed so that the same inputs give the same bytes.
export SOURCE_DATE_EPOCH=1795219200 # 2026-11-21

"$python" - "$data/paradetox_fit.tsv" "$work" <<'PYTHON'
import json, os, re, sys
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

# ARGRE: the words that both sentences begin with are the prompt, as in the authors' code.
with (work / "pairs.jsonl").open("w") as file:
    for toxic, neutral in rows[:1500]:
        common = os.path.commonprefix([toxic, neutral])
        prompt = common[: common.rfind(" ") + 1]
        pair = {
            "prompt": prompt,
            "positive": neutral[len(prompt) :],
            "negative": toxic[len(prompt) :],
        }
        if pair["positive"] and pair["negative"]:
            file.write(json.dumps(pair) + "\n")
PYTHON

cd "$work"
"$python" -m server fit argre --model embedded --pairs pairs.jsonl \
    --out detox-argre.safetensors --dtype bfloat16 --threads 2 \
    --description "Less toxic text. ARGRE reward head and direction, fitted on ParaDetox: toxic \
sentences and their neutral rewrites. A demonstration on a very small model, not a safety \
guarantee."
mv detox-argre.safetensors "$out"

"$python" -m server fit lineas --model embedded --source toxic.txt --target neutral.txt \
    --out detox-lineas.safetensors --dtype bfloat16 --threads 2 \
    --samples 128 --batch-size 128 --steps 50 --optimizer adam --learning-rate 0.002 \
    --description "Less toxic text. LinEAS maps, fitted on ParaDetox: toxic sentences and their \
neutral rewrites. A demonstration on a very small model, not a safety guarantee."
mv detox-lineas.safetensors "$out"
