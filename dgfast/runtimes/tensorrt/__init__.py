"""TensorRT and TensorRT for RTX: the builder of engines, their files, and what loads them."""
