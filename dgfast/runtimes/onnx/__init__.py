"""ONNX: the writer of files, and ONNX Runtime."""
