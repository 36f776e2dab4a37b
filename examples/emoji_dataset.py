"""Make a training set of a colour font's emoji: images 32 x 32 on white, Unicode's groups as classes.

apt-get install fonts-noto-color-emoji unicode-data; pip install fonttools pillow
python examples/emoji_dataset.py emoji.npz

Reads the PNGs in the font's one strike (tables CBLC and CBDT) and the groups in Unicode's emoji-test.txt. Emoji of one
code point are taken; skin tones, flags and joined ones would be near copies of each other on both sides of the split.
"""

import io
import sys
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 32
EMOJI_STYLE = 0xFE0F  # asks for the colour glyph; the font has no other


def groups_of(table: Path) -> dict[str, list[int]]:
    """Code points of each group, in the table's order."""
    groups: dict[str, list[int]] = {}
    name = ""
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            name = line.removeprefix("# group:").strip()
        code, _, rest = line.partition(";")
        if not code or line.startswith("#") or not rest.strip().startswith("fully-qualified"):
            continue
        points = [point for point in (int(part, 16) for part in code.split()) if point != EMOJI_STYLE]
        if len(points) == 1:
            groups.setdefault(name, []).append(points[0])
    return groups


def picture(png: bytes) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: the glyph in the middle of a white square."""
    glyph = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def main(out: Path, font_file: Path = FONT, table: Path = GROUPS) -> None:
    font = TTFont(font_file)
    glyphs, strike = font.getBestCmap(), font["CBDT"].strikeData[0]
    images, labels = [], []
    groups = groups_of(table)
    for label, (name, points) in enumerate(groups.items()):
        known = [point for point in points if glyphs.get(point) in strike]
        images += [picture(strike[glyphs[point]].imageData) for point in known]
        labels += [label] * len(known)
        print(f"{label} {name}: {len(known)} of {len(points)}")
    np.savez_compressed(out, images=np.stack(images), labels=np.array(labels), class_names=np.array(list(groups)))
    print(f"{len(images)} images in {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
