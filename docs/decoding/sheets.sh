#!/usr/bin/env bash
# Makes the images of docs/decoding from val images of Fashion-MNIST and Blue Marble, and a generated shirt:
#     bash docs/decoding/sheets.sh fashion-mnist-demo runs/blue-marble-adaln-15m docs/decoding
set -euo pipefail

run=$1 colour=$2 out=$3
maskgit=${MASKGIT:-.venv/bin/maskgit}
images=$(mktemp -d)
trap 'rm -rf "$images"' EXIT

tar -xf data/shards/fashion-mnist/val-000000.tar -C "$images" 00000009.png 00000019.png
tar -xf data/shards/blue-marble/val-000000.tar -C "$images" 00001377.png
mv "$images/00000009.png" "$images/sneaker.png"
mv "$images/00001377.png" "$images/coast.png"
mv "$images/00000019.png" "$images/shirt.png"
mkdir "$images/generated"
"$(dirname "$maskgit")/python" - "$images" "$run" "$out" <<'PYTHON'
import sys
import torch
from PIL import Image
from maskgit_pl import MaskGIT
from maskgit_pl.grids import image_grid

folder, run, out = sys.argv[1:]
pipe = MaskGIT.from_pretrained(run)
names = ("confidence", "halton", "margin", "moment", "random", "remdm")
specs = [name if name in ("halton", "random") else {"name": name, "choice_temperature": 12.0} for name in names]
rows = [pipe.generate(pipe.class_names, num_steps=8, seed=0, token_selector=spec, output_type="pt") for spec in specs]
sheet = image_grid(torch.cat(rows), columns=10, row_captions=names, column_captions=pipe.class_names)
sheet.save(f"{out}/selectors.png")
shirts = pipe.generate(["T-shirt/top"], num_steps=8, seed=18)
shirts[0].save(f"{folder}/generated/shirt.png")
Image.open(f"{folder}/sneaker.png").crop((0, 0, 16, 28)).save(f"{folder}/front.png")
Image.open(f"{folder}/shirt.png").crop((0, 0, 28, 16)).save(f"{folder}/upper.png")
PYTHON

"$maskgit" inpaint "$run" "$images/shirt.png" --box 8,8,20,20 --class T-shirt/top --out "$out/inpaint.png" \
    --filmstrip "$out/inpaint-filmstrip.png"
"$maskgit" edit "$run" "$images/generated/shirt.png" --box 0,12,28,28 --class Pullover --out "$out/edit.png"
"$maskgit" outpaint "$run" "$images/front.png" --right 12 --class Sneaker --seed 8 --out "$out/outpaint-right.png"
"$maskgit" outpaint "$run" "$images/upper.png" --down 12 --class T-shirt/top --out "$out/outpaint-down.png"
"$maskgit" outpaint "$colour" "$images/coast.png" --left 8 --right 8 --up 8 --down 8 --class "Southern South America" --out "$out/outpaint-all.png"
"$maskgit" panorama "$colour" --classes "Arctic Canada,Central America,Middle East" --width 160 --seed 3 --out "$out/panorama.png" \
    --filmstrip "$out/panorama-filmstrip.png"
"$maskgit" sample "$run" --classes Sneaker --per-class 1 --seed 3 --choice-temperature 9 \
    --token-selector '{"name": "remdm", "eta": 0.3}' --out "$images/one.png" --filmstrip "$out/filmstrip.png"
