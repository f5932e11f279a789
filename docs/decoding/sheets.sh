#!/usr/bin/env bash
# Makes the images of docs/decoding from val images of the default data, and a generated shirt:
#     bash docs/decoding/sheets.sh fashion-mnist-demo docs/decoding
set -euo pipefail

run=$1 out=$2
maskgit=${MASKGIT:-.venv/bin/maskgit}
images=$(mktemp -d)
trap 'rm -rf "$images"' EXIT

tar -xf data/shards/fashion-mnist/val-000000.tar -C "$images" 00000009.png 00000019.png
mv "$images/00000009.png" "$images/sneaker.png"
mv "$images/00000019.png" "$images/shirt.png"
mkdir "$images/generated"
"$(dirname "$maskgit")/python" - "$images" "$run" <<'PYTHON'
import sys
from PIL import Image
from maskgit_pl import MaskGIT

folder, run = sys.argv[1:]
shirts = MaskGIT.from_pretrained(run).generate(["T-shirt/top"], num_steps=8, seed=10)
shirts[0].save(f"{folder}/generated/shirt.png")
Image.open(f"{folder}/sneaker.png").crop((0, 0, 16, 28)).save(f"{folder}/front.png")
Image.open(f"{folder}/shirt.png").crop((0, 0, 28, 16)).save(f"{folder}/upper.png")
PYTHON

"$maskgit" inpaint "$run" "$images/shirt.png" --box 8,8,20,20 --class T-shirt/top --out "$out/inpaint.png" \
    --filmstrip "$out/inpaint-filmstrip.png"
"$maskgit" edit "$run" "$images/generated/shirt.png" --box 0,12,28,28 --class Pullover --seed 4 --out "$out/edit.png"
"$maskgit" outpaint "$run" "$images/front.png" --right 12 --class Sneaker --seed 8 --out "$out/outpaint-right.png"
"$maskgit" outpaint "$run" "$images/upper.png" --down 12 --class T-shirt/top --out "$out/outpaint-down.png"
"$maskgit" outpaint "$run" "$images/sneaker.png" --all 8 --class Sneaker --out "$out/outpaint-all.png"
"$maskgit" panorama "$run" --classes Trouser,Bag,Sandal --width 140 --overlap 0.3 --out "$out/panorama.png" \
    --filmstrip "$out/panorama-filmstrip.png"
"$maskgit" sample "$run" --classes Sneaker --per-class 1 --seed 3 --choice-temperature 9 \
    --token-selector '{"name": "remdm", "eta": 0.3}' --out "$images/one.png" --filmstrip "$out/filmstrip.png"
