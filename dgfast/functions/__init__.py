"""Users' functions with gradients inside: as functions of tensors in a row, judged pure, tried on other inputs."""
