"""Draws digits from an exported step, with numpy and ONNX Runtime alone: neither torch nor dgfast.

python -m dgfast.export.to_onnx --what step --out exported
python examples/onnx_only.py exported/mnist32-step-dynamic-float32.onnx digits.png
"""

import itertools
import json
import struct
import sys
import zlib

try:
    import numpy as np
    import onnxruntime
except ImportError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'dgfast[onnx]', or numpy and onnxruntime alone")


def write_png(path: str, image: np.ndarray) -> None:  # uint8 [H, W]
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


if len(sys.argv) != 3:
    sys.exit("usage: python examples/onnx_only.py MODEL.onnx PICTURE.png")
model, picture = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
sigmas, weights = (json.loads(metadata[name]) for name in ("sigmas", "weights"))
fixed = {name: np.array([weight], np.float32) for name, weight in weights.items()}
fixed["class_labels"] = np.eye(10, dtype=np.float32).repeat(4, axis=0)
side = session.get_inputs()[0].shape[-1]
x = sigmas[0] * np.random.default_rng(0).standard_normal((40, 1, side, side), np.float32)
for sigma, sigma_next in itertools.pairwise(sigmas):
    levels = {"sigma": np.full(40, sigma, np.float32), "sigma_next": np.full(40, sigma_next, np.float32)}
    (x,) = session.run(None, {"x": x.astype(np.float32), **levels, **fixed})
pixels = (127.5 * x + 128).clip(0, 255).astype(np.uint8)
write_png(picture, pixels.reshape(10, 4, side, side).transpose(1, 2, 0, 3).reshape(4 * side, 10 * side))
